"""One page about a profile: heat maps with experts clustered, best substitutes, popularity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sere_sglang.files import picture, write_output
from sere_sglang.profile.file import SereProfile
from sere_sglang.profile.report import (
    best_similarity,
    expected_active,
    matrices_of,
    measures_of,
    upper,
)
from sere_sglang.profile.surrogate_report import SurrogateReport, surrogate_reports

_MAX_MAPS = 8
_COLUMNS = 4


def plot_profile(profile: SereProfile, path: Path, measure: str | None = None) -> None:
    """Write a PNG, PDF or SVG (by suffix)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matrices = matrices_of(profile, measure)
    shown = _evenly(list(matrices), _MAX_MAPS)
    surrogates = surrogate_reports(profile)
    columns = min(_COLUMNS, len(shown))
    map_rows = -(-len(shown) // columns)
    figure = plt.figure(
        figsize=(16 if surrogates else 13, 3.2 * map_rows + 3.7), layout="constrained"
    )
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.2 * map_rows, 3.1])
    above, below = parts
    low = min(upper(m).min().item() for m in matrices.values())
    high = max(upper(m).max().item() for m in matrices.values())
    maps = above.subplots(map_rows, columns, squeeze=False)
    for axes in maps.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, layer in zip(maps.flat, shown, strict=False):
        image = _heat_map(axes, matrices[layer], low, high)
        axes.set_title(f"layer {layer}", fontsize=10)
    label = f"similarity ({measure or _name(profile)})"
    above.colorbar(image, ax=maps, shrink=0.8, fraction=0.02, pad=0.01, label=label)
    above.supxlabel("experts, similar ones side by side", fontsize=8)
    panels = below.subplots(1, 5 if surrogates else 4)
    histogram, substitutes, popularity, activation = panels[:4]
    _histogram(histogram, matrices)
    _best_substitutes(substitutes, matrices)
    _popularity(popularity, profile)
    _activation(activation, profile)
    if surrogates:
        _surrogates(panels[4], surrogates)
    meta = profile.metadata
    figure.suptitle(
        f"Expert similarity of {Path(meta.model).name or 'a model'} "
        f"({profile.num_experts} experts, top-{meta.top_k}; {meta.num_tokens} tokens)",
        fontsize=12,
    )
    write_output(path, picture(figure, path, dpi=150), "--plot")
    plt.close(figure)


def cluster_order(matrix: torch.Tensor) -> list[int]:
    """Experts so that similar ones lie side by side (average linkage, optimal leaf order)."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(matrix) < 3:
        return list(range(len(matrix)))
    distance = 1 - matrix.to(torch.float64)
    condensed = squareform(distance.fill_diagonal_(0).numpy(), checks=False)
    return leaves_list(linkage(condensed, "average", optimal_ordering=True)).tolist()


def _heat_map(axes: Any, matrix: torch.Tensor, low: float, high: float) -> Any:
    order = cluster_order(matrix)
    shown = matrix[order][:, order].clone()
    shown.fill_diagonal_(float("nan"))  # 1 by definition, it would take the colours
    image = axes.imshow(shown.numpy(), vmin=low, vmax=high, cmap="viridis", interpolation="nearest")
    if len(order) <= 32:
        axes.set_xticks(range(len(order)), order, fontsize=4, rotation=90)
        axes.set_yticks(range(len(order)), order, fontsize=4)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    return image


def _histogram(axes: Any, matrices: dict[int, torch.Tensor]) -> None:
    pairs = torch.cat([upper(m) for m in matrices.values()]).numpy()
    best = torch.cat([best_similarity(m) for m in matrices.values()]).numpy()
    bins = np.linspace(pairs.min(), max(pairs.max(), pairs.min() + 1e-6), 31)
    axes.hist(pairs, bins=bins, density=True, alpha=0.6, label="all pairs")
    axes.hist(best, bins=bins, density=True, alpha=0.6, label="best substitute")
    axes.set_title("similarity of pairs, all layers", fontsize=10)
    axes.set_xlabel("similarity")
    axes.set_ylabel("density")
    axes.legend(fontsize=7)


def _best_substitutes(axes: Any, matrices: dict[int, torch.Tensor]) -> None:
    """Low at the left: critical experts, which nobody can stand in for."""
    for layer, matrix in matrices.items():
        axes.plot(best_similarity(matrix).sort().values.numpy(), lw=1, label=f"layer {layer}")
    axes.set_title("best substitute of each expert", fontsize=10)
    axes.set_xlabel("expert, most critical first")
    axes.set_ylabel("similarity")
    if len(matrices) <= _MAX_MAPS:
        axes.legend(fontsize=7)


def _popularity(axes: Any, profile: SereProfile) -> None:
    for layer, tables in profile.tables.items():
        if "popularity" in tables:
            counts = tables["popularity"].double().sort(descending=True).values
            axes.plot((counts / counts.mean().clamp(min=1)).numpy(), lw=1, label=f"layer {layer}")
    axes.axhline(1, color="grey", lw=0.7, ls=":")
    axes.set_ylim(bottom=0)
    axes.set_title("popularity", fontsize=10)
    axes.set_xlabel("expert, most used first")
    axes.set_ylabel("use (1 = even)")
    if 0 < len(profile.tables) <= _MAX_MAPS:
        axes.legend(fontsize=7)


def _activation(axes: Any, profile: SereProfile) -> None:
    ranks = [t["popularity_by_rank"] for t in profile.tables.values() if "popularity_by_rank" in t]
    tokens = profile.metadata.num_tokens
    if not ranks or not tokens:
        axes.text(0.5, 0.5, "no popularity in this profile", ha="center", transform=axes.transAxes)
        return
    top_k = ranks[0].shape[0]
    batches = [2**n for n in range(9)]
    axes.set_title("experts active in a decode step", fontsize=10)
    for s in _evenly(list(range(1, top_k + 1)), 5):
        mean = [sum(expected_active(r, tokens, s, b) for r in ranks) / len(ranks) for b in batches]
        axes.plot(batches, mean, marker=".", label=f"S={s}" if s < top_k else "plain")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches[::2], batches[::2])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("decode batch, tokens")
    axes.set_ylabel("expected active experts per layer")
    axes.legend(fontsize=7)


def _surrogates(axes: Any, layers: list[SurrogateReport]) -> None:
    """A ring marks what the profile holds."""
    labels = ["best\nother", "mean", *map(str, layers[0].by_rank)]
    for row in layers:
        shares = [row.best_other, row.mean, *row.by_rank.values()]
        (line,) = axes.plot(shares, marker=".", lw=1, label=f"layer {row.layer}")
        at = sum(rank <= row.rank for rank in row.by_rank) + 1
        axes.plot(at, row.stored, marker="o", mfc="none", ms=9, color=line.get_color())
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]), top=1)
    axes.set_title("explained of an expert, held out", fontsize=10)
    axes.set_xlabel("stand-in; numbers are ranks")
    axes.set_ylabel("share of its output's energy")
    if len(layers) <= _MAX_MAPS:
        axes.legend(fontsize=7)


def _name(profile: SereProfile) -> str:
    return measures_of(profile)[0]


def _evenly(items: list[int], most: int) -> list[int]:
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
