"""What re-routing is expected to do to a batch: active experts and loss, by rows, S and rho.

From the profile alone, computed once when a server starts. Tokens are taken as independent draws
from the popularity of each rank (``popularity_by_rank``), so an expert is primary in a batch of n
rows with probability 1 - (1 - r)^n, and the best primary of an expert is the first of its
neighbours, by similarity, that is primary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sere_sglang.profile import SereProfile

MAX_ROWS = 1024
"""Rows beyond it are looked up as this many: P has every popular expert long before."""

_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
_QUANTILES = (0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
_CELLS = 16 * 128 * 128  # of similarity matrices that are looked at: under a second


@dataclass(frozen=True)
class Expectation:
    """Row n of each table belongs to a batch of n rows, up to `MAX_ROWS`; float64.

    points: the (S, rho) that the columns stand for.
    plain: ``[rows]`` active experts, summed over the layers, of exact routing.
    active: ``[rows, points]`` the same after re-routing.
    loss: ``[rows, points]`` routing weight that moves, each share times 1 - similarity; a mean
        over the layers. 0 is exact routing.
    """

    points: tuple[tuple[int, float], ...]
    plain: np.ndarray
    active: np.ndarray
    loss: np.ndarray
    num_layers: int
    top_k: int


@dataclass(frozen=True)
class LayerStatistics:
    """similarity: ``[E, E]``; by_rank: ``[K, E]``, probability that the slot of a rank holds e."""

    similarity: np.ndarray
    by_rank: np.ndarray


def statistics_of(profile: SereProfile) -> dict[int, LayerStatistics]:
    """Per MoE layer. A profile without popularity counts is read as uniform routing."""
    layers = {}
    for layer, similarity in profile.similarity.items():
        counts = profile.tables.get(layer, {}).get("popularity_by_rank")
        experts, top_k = similarity.shape[0], profile.metadata.top_k or 2
        if counts is None:
            by_rank = np.full((top_k, experts), 1.0 / experts)
        else:
            by_rank = counts.double().numpy()
            by_rank = by_rank / np.maximum(by_rank.sum(axis=1, keepdims=True), 1.0)
        layers[layer] = LayerStatistics(similarity.double().numpy(), by_rank)
    return layers


def rank_weights(top_k: int) -> np.ndarray:
    """Assumed share of the routing weight by rank, float64 ``[K]``: falls linearly, sums to 1."""
    return np.arange(top_k, 0, -1) * 2.0 / (top_k * (top_k + 1))


def thresholds_of(layers: Mapping[int, LayerStatistics]) -> tuple[float, ...]:
    """rho worth considering: 0, and quantiles of this model's own similarities."""
    pairs = np.concatenate([_upper(layer.similarity) for layer in layers.values()])
    found = {round(float(rho), 3) for rho in np.quantile(pairs, _QUANTILES)}
    return (0.0, *sorted(rho for rho in found if 0.0 < rho <= 1.0))


def expect(
    layers: Mapping[int, LayerStatistics], thresholds: Sequence[float] | None = None
) -> Expectation:
    """Tables for every S in 1..K-1 and rho of `thresholds` (default: `thresholds_of`).

    Large models are represented by some of their layers, evenly spaced.
    """
    chosen = list(layers.values())
    most = max(2, _CELLS // chosen[0].similarity.size)
    if len(chosen) > most:
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, most).astype(int)]
    if thresholds is None:
        thresholds = thresholds_of(dict(enumerate(chosen)))
    top_k = chosen[0].by_rank.shape[0]
    points = tuple((s, rho) for s in range(1, top_k) for rho in thresholds)
    rows = np.array(_ROWS)
    plain = np.zeros(len(rows))
    active = np.zeros((len(rows), len(points)))
    loss = np.zeros_like(active)
    for layer in chosen:
        _add_layer(layer, rows, thresholds, plain, active, loss)
    per_layer = len(layers) / len(chosen)
    every = np.arange(MAX_ROWS + 1)

    def spread(table: np.ndarray) -> np.ndarray:
        at = np.log2(np.maximum(every, 1))
        return np.stack([np.interp(at, np.log2(rows), column) for column in table.T], axis=1)

    return Expectation(
        points=points,
        plain=spread(plain[:, None])[:, 0] * per_layer,
        active=spread(active) * per_layer,
        loss=spread(loss) / len(chosen),
        num_layers=len(layers),
        top_k=top_k,
    )


def _add_layer(
    layer: LayerStatistics,
    rows: np.ndarray,
    thresholds: Sequence[float],
    plain: np.ndarray,
    active: np.ndarray,
    loss: np.ndarray,
) -> None:
    top_k, experts = layer.by_rank.shape
    matrix = np.array(layer.similarity, dtype=np.float64)
    np.fill_diagonal(matrix, -1.0)  # an expert that is primary itself does not move
    order = np.argsort(-matrix, axis=1, kind="stable")[:, : experts - 1]
    best = np.take_along_axis(matrix, order, axis=1)
    lost = 1.0 - best
    # Of each expert's neighbours, the first `near` reach the threshold.
    near = [(best >= rho).sum(axis=1) if rho > 0 else len(order[0]) for rho in thresholds]
    weights = rank_weights(top_k)
    plain += _present(layer.by_rank.sum(axis=0), rows).sum(axis=1)
    for s in range(1, top_k):
        votes = layer.by_rank[:s].sum(axis=0)
        secondary = layer.by_rank[s:]
        used = secondary.sum(axis=0)  # probability that a row has e in a secondary slot
        weight = weights[s:] @ secondary
        for i, n in enumerate(rows):
            primary = _present(votes, n)
            # Row e, column j: the j-th neighbour of e is primary and no nearer one is.
            first = primary[order]
            first[:, 1:] *= np.cumprod(1.0 - first, axis=1)[:, :-1]
            first /= np.maximum(first.sum(axis=1, keepdims=True), 1e-12)  # P is never empty
            # The row that has e in a secondary slot does not vote for it; the others may.
            moves = weight * (1.0 - _present(votes, n - 1))
            # No row votes for e and one has it in a secondary slot.
            outside = np.clip(_present(votes + used, n) - primary, 0.0, None)
            moved = _running_sum(first)
            losing = _running_sum(first * lost)
            everyone = np.arange(experts)
            for t, count in enumerate(near):
                column = (s - 1) * len(thresholds) + t
                loss[i, column] += moves @ losing[everyone, count]
                active[i, column] += primary.sum() + outside @ (1.0 - moved[everyone, count])


def _running_sum(table: np.ndarray) -> np.ndarray:
    """``[rows, n + 1]``: column c sums the first c columns."""
    sums = np.zeros((table.shape[0], table.shape[1] + 1))
    np.cumsum(table, axis=1, out=sums[:, 1:])
    return sums


def _upper(matrix: np.ndarray) -> np.ndarray:
    return matrix[np.triu_indices(len(matrix), 1)]


def _present(probability: np.ndarray, rows: np.ndarray | int) -> np.ndarray:
    """Probability that at least one of n rows has each expert."""
    miss = 1.0 - np.clip(probability, 0.0, 1.0)
    return 1.0 - np.power(miss, np.asarray(rows)[..., None])
