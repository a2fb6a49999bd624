"""The picture of ``sere-sglang simulate``: how each policy followed the traffic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from sere_sglang.files import picture, write_output
from sere_sglang.schedule.simulate import Run

_BINS = 300
_PANELS = (
    ("rows", "rows per step"),
    ("active", "active experts per layer"),
    ("primary_k", "S (0: exact)"),
    ("step_ms", "TPOT, ms"),
    ("loss", "expected loss"),
)


def draw(runs: Sequence[Run], path: Path) -> None:
    """One panel per quantity over time, one line per policy; means of `_BINS` bins."""
    # Rules without an S leave its panel out.
    shown = [p for p in _PANELS if p[0] != "primary_k" or any(any(run.primary_k) for run in runs)]
    figure, panels = plt.subplots(
        len(shown), 1, figsize=(11, 11), layout="constrained", sharex=True
    )
    for run in runs:
        time = np.array(run.time_s)
        edges = np.linspace(0.0, time[-1], _BINS + 1)
        place = np.clip(np.digitize(time, edges) - 1, 0, _BINS - 1)
        count = np.bincount(place, minlength=_BINS)
        for panel, (name, _) in zip(panels, shown, strict=True):
            sums = np.bincount(place, weights=np.array(getattr(run, name)), minlength=_BINS)
            seen = count > 0
            panel.plot(edges[:-1][seen], sums[seen] / count[seen], lw=1.2, label=run.name)
    for panel, (_, label) in zip(panels, shown, strict=True):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[0].legend(ncols=len(runs), loc="upper right", fontsize=8)
    panels[-1].set_xlabel("simulated seconds")
    write_output(path, picture(figure, path, dpi=120))
    plt.close(figure)
