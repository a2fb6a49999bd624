"""``--sere-trace FILE``: one JSON line per forward, to be looked at or replayed (`simulate`)."""

from __future__ import annotations

import dataclasses
import json
import logging
import logging.handlers
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere_sglang.errors import SereError
from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.feedback import Feedback
from sere_sglang.schedule.point import OperatingPoint, described

logger = logging.getLogger(__name__)

_MAX_BYTES = 64 << 20
_BACKUPS = 3
_BUFFERED_LINES = 64


@dataclass(frozen=True)
class TraceStep:
    """time: seconds since the epoch. step_ms, budget: of the feedback that the point follows."""

    time: float
    composition: BatchComposition
    point: OperatingPoint
    step_ms: float | None = None
    budget: float | None = None


class TraceWriter:
    """Appends; beyond 64 MiB the file is rotated, three old ones stay (``FILE.1`` ...).

    Lines are buffered; a full disk costs the trace, never a forward.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = logging.handlers.RotatingFileHandler(path, "a", _MAX_BYTES, _BACKUPS)
        except OSError as error:
            raise SereError(f"--sere-trace {path}: cannot be written ({error})") from None
        file.handleError = self._give_up  # type: ignore
        # Flushed when full and, by logging itself, at exit.
        self._handler = logging.handlers.MemoryHandler(_BUFFERED_LINES, target=file)
        self._failed = False

    def write(
        self, composition: BatchComposition, point: OperatingPoint, feedback: Feedback
    ) -> None:
        if self._failed:
            return
        line = {
            "time": round(time.time(), 6),
            **dataclasses.asdict(composition),
            "point": point.describe(),
            "step_ms": feedback.step_ms,
            "budget": feedback.budget,
        }
        record = logging.LogRecord("trace", logging.INFO, "", 0, json.dumps(line), None, None)
        self._handler.handle(record)

    def flush(self) -> None:
        self._handler.flush()

    def _give_up(self, record: Any) -> None:
        self._failed = True
        logger.exception("--sere-trace: writing failed, tracing stops")


def read_trace(path: str | Path) -> Iterator[TraceStep]:
    """Steps of a trace file, without its rotated parts. Raises `SereError` naming a bad line."""
    fields = [f.name for f in dataclasses.fields(BatchComposition)]
    try:
        with open(path) as file:
            for number, text in enumerate(file, 1):
                try:
                    line = json.loads(text)
                    composition = BatchComposition(**{k: line[k] for k in fields if k in line})
                    step = TraceStep(
                        line["time"], composition, described(line["point"]), line.get("step_ms"),
                        line.get("budget"),
                    )  # fmt: skip
                except (ValueError, KeyError, TypeError) as error:
                    raise SereError(f"--trace {path}, line {number}: no trace ({error})") from None
                yield step
    except OSError as error:
        raise SereError(f"--trace {path}: cannot be read ({error})") from None
