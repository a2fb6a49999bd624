"""How ``sere-sglang bench`` puts what it measured into words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sere_sglang.cli.literal import literal

if TYPE_CHECKING:
    from rich.table import Table

SURE_ROUNDS = 6
"""The median of fewer has no 95 % interval: five rounds lie all on one side of it 1 time in 16."""
_REFERENCES = ("plain", "off")


@dataclass
class Row:
    """One line of the table and of bench.json.

    tok_s: decoded per second by all streams, the median over rounds. tpot_*: milliseconds from one
    token of a stream to the next. over_off_interval: of the median ratio over rounds, 95 %.
    active_*: distinct experts per MoE layer and step, before and after re-routing, a mean over all
    decode steps; rerouted_steps: the share of them that a policy did not leave exact. kl: to exact
    routing (plain SGLang where that was measured), nats per token; 95 % by resampling sequences.
    """

    streams: int
    routing: str
    rounds: int
    tok_s: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    over_off: float
    over_off_interval: tuple[float, float]
    active_before: float | None
    active_after: float | None
    rerouted_steps: float | None
    kl: float | None
    kl_interval: tuple[float, float] | None
    tok_s_by_round: list[float] = field(repr=False)


def gain(ratio: float, interval: tuple[float, float], rounds: int) -> str:
    """A speed over exact routing's, in words that claim no more than was measured."""
    low, high = (round(bound, 2) for bound in interval)
    bounds = f"({low:.2f}-{high:.2f})"
    if low <= 1.0 <= high:
        return f"no gain {bounds}"
    if rounds < SURE_ROUNDS:
        return f"{ratio:.2f}? {bounds}"
    return f"{ratio:.2f}x {bounds}" + (" slower" if high < 1.0 else "")


def table(rows: Sequence[Row], title: str) -> Table:
    """Of all levels, a section each."""
    from rich.table import Table

    table = Table(title=literal(title, "table.title"))
    for head in ("streams", "routing", "tok/s", "x off", "TPOT p50", "p99 ms", "active", "KL"):
        table.add_column(head, justify="left" if head == "routing" else "right")
    for i, row in enumerate(rows):
        table.add_row(
            str(row.streams),
            {"plain": "plain SGLang", "off": "SERE off"}.get(row.routing, row.routing),
            f"{row.tok_s:.0f}",
            "" if row.routing == "off" else gain(row.over_off, row.over_off_interval, row.rounds),
            f"{row.tpot_p50_ms:.2f}",
            f"{row.tpot_p99_ms:.2f}",
            _active(row),
            _kl(row),
            end_section=i + 1 == len(rows) or rows[i + 1].streams != row.streams,
        )
    return table


def best(rows: Sequence[Row]) -> str | None:
    """The sentence to take home: the mildest routing that is faster, at the most streams."""
    for streams in sorted({row.streams for row in rows}, reverse=True):
        faster = [
            row for row in rows
            if row.streams == streams and row.routing not in _REFERENCES and row.kl is not None
            and row.rounds >= SURE_ROUNDS and round(row.over_off_interval[0], 2) > 1.0
        ]  # fmt: skip
        if faster:
            mild = min(faster, key=lambda row: row.kl or 0.0)
            told = gain(mild.over_off, mild.over_off_interval, mild.rounds)
            return f"at {streams} streams {mild.routing} is {told}, at {mild.kl:.4f} nats of KL"
    return None


def bursts(rows: Sequence[Row]) -> str | None:
    """A warning where tokens came to this process in bursts, not one step after the other."""
    found = [row for row in rows if row.tpot_p50_ms < 500 * row.streams / row.tok_s]
    if not found:
        return None
    where = ", ".join(dict.fromkeys(f"{row.streams} streams {row.routing}" for row in found))
    return (
        f"tokens came in bursts, the machine is too busy for its times to be trusted: {where}; "
        "repeat it on an idle machine"
    )


def _active(row: Row) -> str:
    if row.active_before is None or row.active_after is None:
        return "-"
    if row.routing in _REFERENCES:
        return f"{row.active_before:.1f}"
    return f"{row.active_before:.1f} > {row.active_after:.1f}"


def _kl(row: Row) -> str:
    if row.kl is None or row.kl_interval is None:
        return "-"
    if row.routing == "plain":
        return "reference"
    low, high = row.kl_interval
    return f"{row.kl:.4f} ({low:.4f}-{high:.4f})"
