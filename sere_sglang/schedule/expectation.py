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

MAX_ROWS = 1024
"""Rows beyond it are looked up as this many: P has every popular expert long before."""

_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
THRESHOLDS = (0.0, 0.3, 0.5, 0.7)
_MAX_LAYERS = 16


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


def rank_weights(top_k: int) -> np.ndarray:
    """Assumed share of the routing weight by rank, float64 ``[K]``: falls linearly, sums to 1."""
    return np.arange(top_k, 0, -1) * 2.0 / (top_k * (top_k + 1))


def expect(
    layers: Mapping[int, LayerStatistics],
    thresholds: Sequence[float] = THRESHOLDS,
) -> Expectation:
    """Tables for every S in 1..K-1 and rho of `thresholds`.

    Models with many layers are represented by `_MAX_LAYERS` evenly spaced ones.
    """
    chosen = list(layers.values())
    if len(chosen) > _MAX_LAYERS:
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, _MAX_LAYERS).astype(int)]
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
    weights = rank_weights(top_k)
    plain += _present(layer.by_rank.sum(axis=0), rows).sum(axis=1)
    for s in range(1, top_k):
        secondary = layer.by_rank[s:]
        used = secondary.sum(axis=0)  # probability that a row has e in a secondary slot
        weight = weights[s:] @ secondary
        for i, n in enumerate(rows):
            primary = _present(layer.by_rank[:s].sum(axis=0), n)
            # Row e, column j: the j-th neighbour of e is primary and no nearer one is.
            member = primary[order]
            misses = np.cumprod(1.0 - member, axis=1)
            first = member.copy()
            first[:, 1:] *= misses[:, :-1]
            moves = first * (1.0 - primary)[:, None]
            for t, rho in enumerate(thresholds):
                column = (s - 1) * len(thresholds) + t
                stays = (best < rho) if rho > 0 else np.zeros_like(best, dtype=bool)
                moved = np.where(stays, 0.0, moves)
                loss[i, column] += weight @ (moved * (1.0 - best)).sum(axis=1)
                critical = np.where(stays, moves, 0.0).sum(axis=1)
                active[i, column] += primary.sum() + critical @ _present(used, n)


def _present(probability: np.ndarray, rows: np.ndarray | int) -> np.ndarray:
    """Probability that at least one of n rows has each expert."""
    miss = 1.0 - np.clip(probability, 0.0, 1.0)
    return 1.0 - np.power(miss, np.asarray(rows)[..., None])
