"""The demo's picture: speed against quality, one panel per number of streams."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from launch.demo import Point, Row


def draw(rows: list[Row], points: list[Point], top_k: int, path: Path) -> None:
    """Left: decode speed over plain against KL. Right: active experts before and after."""
    levels = sorted({row.concurrency for row in rows})
    figure, (speed, active) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    colors = plt.get_cmap("viridis")([0.15, 0.5, 0.8, 0.95])
    for level, color in zip(levels, colors, strict=False):
        mine = [(r, p) for r, p in zip(rows, points * len(levels), strict=True)]
        mine = [(r, p) for r, p in mine if r.concurrency == level and r.primary_k is not None]
        mine.sort(key=lambda pair: pair[0].kl)
        speed.plot(
            [r.kl for r, _ in mine],
            [r.ratio for r, _ in mine],
            "o-",
            color=color,
            label=f"{level} streams",
        )
        if level == levels[-1]:
            for r, p in mine:
                speed.annotate(
                    p.label(top_k).removeprefix("SERE, "),
                    (r.kl, r.ratio),
                    textcoords="offset points",
                    xytext=(6, 6),
                    fontsize=8,
                )
    speed.axhline(1.0, color="grey", lw=1, ls="--")
    speed.annotate(
        "plain SGLang", (0, 1.0), xytext=(4, -12), textcoords="offset points", color="grey"
    )
    speed.set(
        xlabel="KL to plain SGLang, nats per token (held-out text)",
        ylabel="decode tokens/s over plain",
        title="Speed against quality",
    )
    speed.legend()
    labels = [p.label(top_k).removeprefix("SERE, ") for p in points[1:]]
    width = 0.8 / len(levels)
    for i, (level, color) in enumerate(zip(levels, colors, strict=False)):
        mine_rows = [r for r in rows if r.concurrency == level and r.primary_k is not None]
        xs = [x + (i - (len(levels) - 1) / 2) * width for x in range(len(labels))]
        active.bar(xs, [r.active_before for r in mine_rows], width, color=color, alpha=0.25)
        active.bar(
            xs, [r.active_after for r in mine_rows], width, color=color, label=f"{level} streams"
        )
    active.set_xticks(range(len(labels)), labels, fontsize=8)
    active.set(
        ylabel="active experts per MoE layer", title="Experts loaded per decode step (pale: before)"
    )
    active.legend()
    figure.savefig(path, dpi=140)
    plt.close(figure)
