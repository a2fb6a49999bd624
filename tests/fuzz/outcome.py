"""What every fuzzer here holds a function to, and how many cases it tries.

``SERE_FUZZ=50 pytest tests/fuzz`` tries 50 times as many, new ones at each run; without it the
cases are the same each time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings

from sere_sglang.errors import SereError

Result = TypeVar("Result")

_TIMES = int(os.environ.get("SERE_FUZZ", "1"))
_LONGEST_MESSAGE = 3000  # letters; a path of 240 may stand in it, each an escape of ten
_SLOWEST = 20.0  # seconds of one case: a hang, however busy the machine is


def cases(count: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`count` of them, times ``SERE_FUZZ``."""
    return settings(
        max_examples=count * _TIMES,
        derandomize=_TIMES == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(function: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """(result, None) or (None, refusal): one or two lines that a person can read, in time.

    Whatever else is raised fails the test.
    """
    start = time.monotonic()
    try:
        return function(), None
    except SereError as error:
        message = str(error)
        check_message(message)
        return None, message
    finally:
        assert time.monotonic() - start < _SLOWEST, "a hang"


def check_message(message: str) -> None:
    """A refusal names what is wrong and repeats no more of it than fits."""
    assert message.strip() and len(message) <= _LONGEST_MESSAGE, message[:2000]
    assert len(message.splitlines()) <= 2, message
    assert "Traceback" not in message
