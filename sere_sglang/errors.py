"""The one error type users see, and how a command ends with it.

An error is one or two lines that name the flag or file and the fix.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

PREFIX = "sere-sglang: error: "
USER_ERROR = 2
"""Exit status of every command that was asked for something it cannot do."""

_SHOWN = 60
PATH_SHOWN = 240
"""Of a path in a message; Linux has names of 255 at most."""


class SereError(ValueError):
    """SERE was asked for and cannot be given as asked.

    What cannot be printed, be it in a file's name, stands in the message as an escape, and so does
    every line break but the first.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(map(printable, message.split("\n", 1))))


class ProfileError(SereError):
    """A profile that cannot be used, with the file and the fix."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """On a command line a `SereError` is one line on stderr and exit status 2."""
    try:
        yield
    except SereError as error:
        print(f"{PREFIX}{error}", file=sys.stderr, flush=True)
        raise SystemExit(USER_ERROR) from None


def printable(text: str) -> str:
    """`text` in one line that does nothing to a terminal: what cannot be printed is an escape."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def shown(value: object) -> str:
    """`value` as an error message repeats it: its repr, cut where it gets long."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return "a number of more than 60 digits"  # whose repr Python may refuse
    if isinstance(value, (str, bytes)):
        value = value[: 2 * _SHOWN]
    try:
        return cut(repr(value))
    except (RecursionError, ValueError):  # the latter of a number within it, as above
        return "something too deep or long to show"


def cut(text: str, limit: int = _SHOWN) -> str:
    """`text`, its end left out where it gets long."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
