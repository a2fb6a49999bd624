"""The settings of a server that a command borrows by ``--url``: as before, whatever ends it.

A command that is killed leaves the server at whatever point it was measuring. What was there before
lies beside its results until it ends, and the same command puts it back before it goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sere_sglang.errors import SereError
from sere_sglang.files import write_output
from sere_sglang.measure.server import Server, live_state
from sere_sglang.schedule.settings import Settings

FILE = "settings_before.json"


@contextlib.contextmanager
def settings_borrowed(server: Server, results: Path) -> Iterator[None]:
    """results: the command's folder. Raises `SereError`."""
    kept = results / FILE
    before = _left_behind(kept, server.url)
    if before is None:
        before = _settings_of(server)
        write_output(kept, json.dumps({"url": server.url, "settings": before}) + "\n")
    try:
        _put_back(server, before)
    except (OSError, RuntimeError) as error:
        raise _unusable(kept, f"the server does not take them: {error}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError, RuntimeError, SereError):
            _put_back(server, before)
        kept.unlink(missing_ok=True)


def _settings_of(server: Server) -> dict[str, Any]:
    return dataclasses.asdict(Settings.from_state(live_state(server)))


def _put_back(server: Server, settings: dict[str, Any]) -> None:
    """Unless they are what it has: setting them starts re-routing that has failed."""
    if _settings_of(server) != settings:
        server.set_sere(**settings)


def _left_behind(kept: Path, url: str) -> dict[str, Any] | None:
    """By a run that was killed; None where none was, or one of another server's."""
    try:
        found = json.loads(kept.read_text())
        settings: dict[str, Any] = found["settings"]
        return settings if found["url"] == url else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unusable(kept, str(error)) from None


def _unusable(kept: Path, what: str) -> SereError:
    return SereError(
        f"{kept}: the settings that a killed run kept cannot be put back ({what}); delete the file "
        "and set the server as you want it"
    )
