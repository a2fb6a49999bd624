"""The picture of ``sere-sglang bench``: speed against quality, and the experts that were loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sere_sglang.files import picture, write_output

_MARKERS = {"off": "o", "S=1": "v", "S=2": "s", "S=3": "D", "adaptive": "*", "auto": "P"}
_SIZES = {"adaptive": 15, "auto": 11}


class Row(Protocol):
    """active_*: experts per layer and step. over_off_interval: 95 %. kl: nats per token. All are
    numbers; a row that lacks one is not drawn."""

    streams: int
    routing: str
    active_before: Any
    active_after: Any
    over_off: float
    over_off_interval: tuple[float, float]
    kl: Any


def draw(rows: Sequence[Row], path: Path, reference: str = "plain SGLang") -> None:
    """Left: speed over exact routing against KL to `reference`. Right: active experts per layer."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.8), layout="constrained", width_ratios=(1.25, 1)
    )
    _speed_against_quality(left, [row for row in rows if row.routing != "plain"], reference)
    _active_experts(right, [row for row in rows if row.routing != "plain"])
    write_output(path, picture(figure, path, dpi=140))
    plt.close(figure)


def _levels(rows: Sequence[Row]) -> list[tuple[int, Any]]:
    levels = sorted({row.streams for row in rows})
    colors = plt.get_cmap("viridis")(
        [0.85 * i / max(1, len(levels) - 1) for i in range(len(levels))]
    )
    return list(zip(levels, colors, strict=True))


def _speed_against_quality(panel: Any, rows: Sequence[Row], reference: str) -> None:
    for level, color in _levels(rows):
        mine = sorted((row for row in rows if row.streams == level), key=lambda row: row.kl)
        static = [row for row in mine if row.routing not in _SIZES]
        panel.plot(
            [row.kl for row in static], [row.over_off for row in static], color=color, lw=1.2,
            label=f"{level} streams",
        )  # fmt: skip
        for row in mine:
            low, high = row.over_off_interval
            panel.errorbar(
                row.kl, row.over_off, [[max(row.over_off - low, 0)], [max(high - row.over_off, 0)]],
                color=color,
                marker=_MARKERS.get(row.routing, "X"), ms=_SIZES.get(row.routing, 6),
                mec="black" if row.routing in _SIZES else color, capsize=2, lw=1,
                zorder=3 if row.routing in _SIZES else 2,
            )  # fmt: skip
    for routing in dict.fromkeys(row.routing for row in rows):
        name = "SERE off" if routing == "off" else routing
        panel.plot([], [], _MARKERS.get(routing, "X"), color="grey", label=name)
    panel.axhline(1.0, color="grey", lw=1, ls="--")
    speeds = [speed for row in rows for speed in (row.over_off, *row.over_off_interval)]
    panel.set(
        xlabel=f"KL to {reference}, nats per token",
        ylabel="decode tokens/s over exact routing (SERE off)",
        title="Speed against quality",
        ylim=(min(0.85, 0.95 * min(speeds)), 1.3 * max(speeds)),
    )
    panel.set_xscale("symlog", linthresh=0.01, linscale=0.5)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlim(-0.001, 1.4 * max(row.kl for row in rows) + 0.01)
    panel.grid(alpha=0.3)
    panel.legend(ncols=3, fontsize=8, loc="upper left")


def _active_experts(panel: Any, rows: Sequence[Row]) -> None:
    levels = _levels(rows)
    routings = list(dict.fromkeys(row.routing for row in rows))
    width = 0.8 / len(levels)
    for i, (level, color) in enumerate(levels):
        mine = {row.routing: row for row in rows if row.streams == level}
        shift = (i - (len(levels) - 1) / 2) * width
        xs = [x + shift for x, routing in enumerate(routings) if routing in mine]
        found = [mine[routing] for routing in routings if routing in mine]
        panel.bar(xs, [row.active_before for row in found], width, color=color, alpha=0.25)
        after = [row.active_after for row in found]
        panel.bar(xs, after, width, color=color, label=f"{level} streams")
    names = ["SERE off" if routing == "off" else routing for routing in routings]
    panel.set_xticks(range(len(routings)), names)
    panel.set(
        ylabel="active experts per MoE layer",
        title="Experts loaded per decode step (pale: before)",
        ylim=(0, 1.2 * max(row.active_before for row in rows)),
    )
    panel.legend(loc="upper left", ncols=len(levels))
