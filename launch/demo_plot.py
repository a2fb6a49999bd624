"""The demo's picture: speed against quality, and the experts that were loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from launch.experiment import Point

if TYPE_CHECKING:
    from launch.experiment import Row


def draw(rows: list[Row], padded: list[Row], points: list[Point], top_k: int, path: Path) -> None:
    """Left: speed against KL. Middle: active experts. Right: speed against KL, padded experts."""
    width = 17 if padded else 12
    figure, panels = plt.subplots(
        1, 3 if padded else 2, figsize=(width, 4.8), layout="constrained", squeeze=False
    )
    _speed_against_quality(panels[0][0], rows, points, top_k)
    _active_experts(panels[0][1], rows, points, top_k)
    if padded:
        _speed_against_quality(panels[0][2], padded, points, top_k)
        panels[0][2].set_title("The same, experts padded to 3 MB each")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _levels(rows: list[Row]) -> list[tuple[int, Any]]:
    levels = sorted({row.concurrency for row in rows})
    colors = plt.get_cmap("viridis")([0.9 * i / max(1, len(levels)) for i in range(len(levels))])
    return list(zip(levels, colors, strict=True))


def _speed_against_quality(panel: Any, rows: list[Row], points: list[Point], top_k: int) -> None:
    markers = dict(zip(points[1:], "oDs^xP*vd", strict=False))
    for level, color in _levels(rows):
        mine = {Point(r.primary_k, r.threshold): r for r in rows if r.concurrency == level}
        along_s = [p for p in markers if p.primary_k == top_k or not p.threshold]
        line = sorted((mine[p].kl or 0.0, mine[p].ratio) for p in along_s)
        panel.plot(*zip(*line, strict=True), color=color, lw=1.2, label=f"{level} streams")
        for point, marker in markers.items():
            panel.plot(mine[point].kl or 0.0, mine[point].ratio, marker, color=color)
    for point, marker in markers.items():
        panel.plot([], [], marker, color="grey", label=point.label(top_k).removesuffix(", rho=0"))
    panel.axhline(1.0, color="grey", lw=1, ls="--")
    panel.text(
        0.99, 1.0, "plain SGLang", color="grey", ha="right", va="bottom",
        transform=panel.get_yaxis_transform(),
    )  # fmt: skip
    panel.set(
        xlabel="KL to plain SGLang, nats per token (held-out text)",
        ylabel="decode tokens/s over plain",
        title="Demo model: speed against quality",
        ylim=(0.9, 1.35 * max(row.ratio for row in rows)),
    )
    panel.set_xscale("symlog", linthresh=0.01, linscale=0.5)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlim(-0.001, 1.4 * max(row.kl or 0.0 for row in rows) + 0.01)
    panel.legend(ncols=3, fontsize=8, loc="upper left")


def _active_experts(panel: Any, rows: list[Row], points: list[Point], top_k: int) -> None:
    levels = _levels(rows)
    labels = [
        p.label(top_k).replace(", ", "\n") for p in points[1:]
    ]  # plain loads what 'SERE off' loads
    width = 0.8 / len(levels)
    for i, (level, color) in enumerate(levels):
        mine = [row for row in rows if row.concurrency == level and row.primary_k is not None]
        xs = [x + (i - (len(levels) - 1) / 2) * width for x in range(len(labels))]
        panel.bar(xs, [row.active_before for row in mine], width, color=color, alpha=0.25)
        after = [row.active_after for row in mine]
        panel.bar(xs, after, width, color=color, label=f"{level} streams")
    panel.set_xticks(range(len(labels)), labels, fontsize=8)
    panel.set(
        ylabel="active experts per MoE layer",
        title="Demo model: experts loaded per decode step (pale: before)",
        ylim=(0, 1.25 * max(row.active_before for row in rows)),
    )
    panel.legend(loc="upper left", ncols=len(levels))
