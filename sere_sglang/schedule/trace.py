"""``--sere-trace FILE``: one JSON line per forward, to be looked at or replayed (`simulate`)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import logging.handlers
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sere_sglang.errors import PATH_SHOWN, SereError, cut, shown
from sere_sglang.names import RULES
from sere_sglang.schedule.composition import BatchComposition, Mode
from sere_sglang.schedule.point import OFF, OperatingPoint, described

logger = logging.getLogger(__name__)

_MAX_BYTES = 64 << 20
_BACKUPS = 3
_BUFFERED_LINES = 64
_MEASURED = ("step_ms", "budget", "spent_loss")
_MOST = 1 << 53  # of a number
_LONGEST_LINE = 1 << 20  # of 400 layers a point takes 60 kB


@dataclass(frozen=True)
class TraceStep:
    """time: seconds since the epoch. step_ms: of the feedback that the point follows. budget: the
    expected loss that the batch may cost. spent_loss: what the kernels last counted at this point,
    in the mean over layers, of what rules beside ``similarity`` drop."""

    time: float
    composition: BatchComposition
    point: OperatingPoint
    step_ms: float | None = None
    budget: float | None = None
    spent_loss: float | None = None


class TraceWriter:
    """Appends; beyond 64 MiB the file is rotated, three old ones stay (``FILE.1`` ...).

    Lines are buffered; a full disk costs the trace, never a forward.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = logging.handlers.RotatingFileHandler(path, "a", _MAX_BYTES, _BACKUPS)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise SereError(
                f"--sere-trace {cut(str(path), PATH_SHOWN)}: cannot be written "
                f"({reason}); name a file in a folder that the server may write"
            ) from None
        file.handleError = self._give_up  # type: ignore
        # Flushed when full and, by logging itself, at exit.
        self._handler = logging.handlers.MemoryHandler(_BUFFERED_LINES, target=file)
        self._failed = False

    def write(
        self,
        composition: BatchComposition,
        point: OperatingPoint,
        *,
        step_ms: float | None = None,
        budget: float | None = None,
        spent_loss: float | None = None,
    ) -> None:
        """The values of a `TraceStep`, which is timed here."""
        if self._failed:
            return
        line = {
            "time": round(time.time(), 6),
            **dataclasses.asdict(composition),
            "point": point.describe(),
            "step_ms": step_ms,
            "budget": budget,
            "spent_loss": spent_loss,
        }
        record = logging.LogRecord("trace", logging.INFO, "", 0, json.dumps(line), None, None)
        self._handler.handle(record)

    def flush(self) -> None:
        self._handler.flush()

    def _give_up(self, record: Any) -> None:
        if self._failed:  # of the same buffer
            return
        self._failed = True
        logger.warning("--sere-trace: %s; tracing stops, serving goes on", sys.exc_info()[1])


def start_trace(path: str) -> TraceWriter | None:
    """A trace that cannot be opened is like a disk that fills later: nobody's answer needs it."""
    try:
        return TraceWriter(path)
    except SereError as error:
        logger.warning("%s; serving goes on without", error)
        return None


def read_trace(path: str | Path) -> Iterator[TraceStep]:
    """Steps of a trace file, without its rotated parts. Raises `SereError` naming a bad line."""
    name = f"--trace {cut(str(path), PATH_SHOWN)}"
    try:
        with open(path, "rb") as file:
            for number in itertools.count(1):
                text = file.readline(_LONGEST_LINE + 1)
                if not text:
                    return
                try:
                    yield _step(text)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise SereError(
                        f"{name}, line {number}: no trace ({cut(str(error))}); name a file that a "
                        "server wrote with --sere-trace"
                    ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, SereError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise SereError(f"{name}: cannot be read ({reason})") from None


def _step(text: bytes) -> TraceStep:
    """Raises one of `ValueError`, `KeyError`, `TypeError`, `RecursionError` for what is none."""
    if len(text) > _LONGEST_LINE:
        raise ValueError(f"longer than {_LONGEST_LINE} bytes")
    line = json.loads(text)
    if not isinstance(line, dict):
        raise TypeError("no object")
    batch = {f.name: line[f.name] for f in dataclasses.fields(BatchComposition) if f.name in line}
    for name, value in batch.items():
        kind = {"mode": str, "after_idle": bool}.get(name, int)
        if type(value) is not kind or (type(value) is int and not 0 <= value < _MOST):
            raise ValueError(f"{name} is {shown(value)}")
    if batch["mode"] not in get_args(Mode):
        raise ValueError(f"mode is {shown(batch['mode'])}")
    return TraceStep(
        _number("time", line["time"]),
        BatchComposition(**batch),
        _point(line["point"]),
        *(None if line.get(x) is None else _number(x, line[x]) for x in _MEASURED),
    )


def _point(told: Any) -> OperatingPoint:
    """As `described`, of what anybody may have written."""
    if not isinstance(told, dict) or type(told["enabled"]) is not bool:
        raise TypeError("point is none")
    if not told["enabled"]:
        return OFF
    if told["rule"] not in RULES or not isinstance(told["layers"], dict):
        raise ValueError("point is of no rule, or has no layers")
    for values in (told, *told["layers"].values()):
        if values is not None and not isinstance(values, dict):
            raise TypeError("a layer has no point")
        for name in ("primary_k", "threshold", "experts", "loss"):
            value = (values or {}).get(name, 0)
            if _number(name, value) < 0 or (name in ("primary_k", "experts") and value % 1):
                raise ValueError(f"{name} is {shown(value)}")
    return described(told)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_MOST < value < _MOST:
        raise ValueError(f"{name} is {shown(value)}")
    return value
