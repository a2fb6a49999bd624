"""What several commands take, and how it is read. Imports no more than a help does."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sere_sglang.errors import SereError, cut

if TYPE_CHECKING:
    from sere_sglang.measure.routing import Routing

MOST_STREAMS = 256

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ApiKey = Annotated[str | None, typer.Option(help="Of the server at --url.")]
ServedModel = Annotated[
    str | None, typer.Option(help="Model folder or hub id; a server of it is started.")
]
WalkedText = Annotated[
    Path | None,
    typer.Option(
        help="Text to walk, best your own traffic: .txt, .jsonl or .parquet (default: "
        "built-in text, which calibration may have seen).",
        show_default=False,
    ),
]
Column = Annotated[str, typer.Option(help="Text column of .jsonl and .parquet.")]
ServerArgs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[-- SGLANG FLAGS]",
        help="Anything sglang serve takes, for instance: -- --tp 2 --quantization fp8",
    ),
]

MeasuredServerArgs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[-- SGLANG FLAGS]",
        help="Anything sglang serve takes but its address (--port, --host, --ssl-keyfile, ...) and "
        "--config, for instance: -- --tp 2 --quantization fp8",
    ),
]


def whole_number(text: str, most: int) -> int | None:
    """Of plain digits, from 1 to `most`; None for all else."""
    number = int(text) if re.fullmatch("[0-9]{1,18}", text) else 0
    return number if 1 <= number <= most else None


def numbers(value: str, flag: str, most: int = MOST_STREAMS) -> list[int]:
    """Of a comma-separated list, ascending. Raises `SereError` naming `flag`."""
    found = {whole_number(part.strip(), most) for part in value.split(",")}
    if None in found:
        raise SereError(f"{flag} {cut(value)}: give numbers from 1 to {most}, as in {flag} 4,16,32")
    return sorted(number for number in found if number)


def positive(value: float) -> float:
    """Of a flag, whose name typer puts before the refusal."""
    if not 0.0 < value < math.inf:  # false for NaN
        raise typer.BadParameter(f"{value:g} is no finite number above 0")
    return value


def routings_of(points: str | None) -> list[Routing] | None:
    """Of --points, ``off`` among them or not; None where it is not given. Raises `SereError`."""
    from sere_sglang.measure.routing import routing_of

    if points is None:
        return None
    chosen = [routing_of(name) for name in points.split(",")]
    if all(routing.name == "off" for routing in chosen):
        raise SereError("--points off: name what to compare with off, as in --points S=2,auto")
    return chosen


def make_folder(out: Path) -> None:
    """Raises `SereError`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SereError(f"--out {out}: no folder to write in ({error.strerror})") from None
