"""The picture of `benchmarks.adaptive`: the load, what each policy did, speed against quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from sere_sglang.schedule.expectation import Expectation
from sere_sglang.schedule.trace import TraceStep

_SHOWN = ("off", "static S=1", "adaptive", "auto")


def draw(
    runs: dict[str, list[TraceStep]],
    rows: list[dict[str, Any]],
    expected: Expectation,
    path: Path,
) -> None:
    """Left, over the last round: rows, expected active experts and step time. Right: each policy's
    speed and KL."""
    figure = plt.figure(figsize=(13, 6.5), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(1.6, 1))
    panels = [figure.add_subplot(grid[i, 0]) for i in range(3)]
    colors = {row["policy"]: f"C{i}" for i, row in enumerate(rows)}
    for name in _SHOWN:
        color = colors[name]
        decode = [s for s in runs[name] if s.composition.mode == "decode"]
        time = np.array([s.time for s in decode])
        time -= time[0]
        step_ms = np.minimum(1000 * np.diff(time, append=time[-1]), 400)
        rows_of = [s.composition.num_tokens for s in decode]
        panels[0].plot(time, rows_of, lw=1, color=color, label=name)
        active = [expected.effect(s.composition.num_tokens, s.point)[0] for s in decode]
        active = [experts / expected.num_layers for experts in active]
        panels[1].plot(time, active, lw=1, color=color, drawstyle="steps-post")
        panels[2].plot(time, _smooth(step_ms), lw=1, color=color)
    for panel, label in zip(
        panels, ("rows per step", "experts per layer", "step, ms"), strict=True
    ):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[0].legend(ncols=3, loc="lower center")
    panels[-1].set_xlabel("seconds")
    right = figure.add_subplot(grid[:, 1])
    for row in rows:
        adaptive = row["policy"].startswith(("adaptive", "auto"))
        low, high = row["ratio_interval"]
        right.errorbar(
            row["kl"], row["ratio"], [[row["ratio"] - low], [high - row["ratio"]]],
            fmt="*" if adaptive else "o", ms=14 if adaptive else 8, capsize=2,
            color=colors[row["policy"]],
        )  # fmt: skip
        right.annotate(
            row["policy"], (row["kl"], row["ratio"]), textcoords="offset points", xytext=(7, 5)
        )
    right.set(
        xlabel="KL to exact routing, nats per token",
        ylabel="tokens/s over off",
        title="speed against quality",
    )
    right.margins(x=0.3, y=0.12)
    right.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    if len(values) < width:
        return values
    kernel = np.ones(width) / width
    return np.convolve(np.pad(values, width // 2, mode="edge"), kernel, mode="valid")
