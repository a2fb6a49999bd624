"""Operating points per layer, ordered from exact to the hardest skipping, for every batch size.

A ladder starts with every layer exact. One rung changes one layer; the one that saves the most
experts per loss goes first. S falls by one for all layers before it falls further for any: how
much a layer's error matters for the model's output is not known, and letting one layer pay for
the others was measured to cost more than the expected loss says.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import numpy as np

from sere_sglang.schedule.expectation import Expectation
from sere_sglang.schedule.point import OFF, OperatingPoint

_TINY = 1e-12


@dataclass(frozen=True)
class Ladder:
    """Rung r of one batch size; rung 0 is exact routing. Both arrays are monotone.

    loss: float64 ``[rungs]``, averaged over the layers. active: float64 ``[rungs]``, experts
    summed over the layers.
    """

    loss: np.ndarray
    active: np.ndarray
    _steps: np.ndarray  # [rungs - 1, 2]: layer that changes, and the point it changes to


class Ladders:
    """One `Ladder` per row of an `Expectation`."""

    def __init__(self, expectation: Expectation) -> None:
        self.expectation = expectation
        self._ladders = _climb(expectation)
        self._points: dict[tuple[int, int], OperatingPoint] = {}

    def of(self, batch: int) -> Ladder:
        """For a batch of `batch` rows."""
        return self._ladders[self.expectation.row_of(batch)]

    def point(self, batch: int, rung: int) -> OperatingPoint:
        """The operating point at a rung; the same object each time."""
        if rung == 0:
            return OFF
        key = (self.expectation.row_of(batch), rung)
        known = self._points.get(key)
        if known is None:
            chosen = [OFF] * self.expectation.num_layers
            for layer, column in self._ladders[key[0]]._steps[:rung]:
                chosen[layer] = self.expectation.points[column]
            known = self._points[key] = _joined(self.expectation.layer_ids, chosen)
        return known


def _joined(layer_ids: tuple[int, ...], chosen: list[OperatingPoint]) -> OperatingPoint:
    """The layers' points as one, named after the commonest of those that re-route."""
    common = Counter(p for p in chosen if p.enabled).most_common(1)[0][0]
    if all(p == common for p in chosen):
        return common
    layers = tuple(zip(layer_ids, chosen, strict=True))
    return dataclasses.replace(common, layers=layers)


def _climb(expectation: Expectation) -> list[Ladder]:
    """All batch sizes at once: for S = K-1, K-2, ... the hull of what rho offers to each layer;
    likewise for falling B and for growing loss budgets."""
    rows, layers, _ = expectation.loss.shape
    at_layer = np.indices((rows, layers))
    loss, active = np.zeros((rows, layers)), expectation.plain.copy()
    rungs: list[list[np.ndarray]] = [[] for _ in range(rows)]  # [n, 4] each: see `_sorted`
    strengths = [(-p.primary_k, -p.experts, p.loss) for p in expectation.points]
    for strength in sorted(set(strengths)):
        columns = np.array([i for i, own in enumerate(strengths) if own == strength])
        loss_of, active_of = expectation.loss[..., columns], expectation.active[..., columns]
        edges = []
        while True:
            saves = active[..., None] - active_of
            costs = np.maximum(loss_of - loss[..., None], _TINY)
            slope = np.where((saves > 1e-9) & (loss_of >= loss[..., None]), saves / costs, 0.0)
            best = slope.argmax(axis=-1)
            own = (*at_layer, best)
            going = slope[own] > 0.0
            if not going.any():
                break
            to_loss = np.where(going, loss_of[own], loss)
            to_active = np.where(going, active_of[own], active)
            edges.append((slope[own], to_loss - loss, active - to_active, columns[best]))
            loss, active = to_loss, to_active
        for row in range(rows) if edges else ():
            rungs[row].append(_sorted([tuple(part[row] for part in edge) for edge in edges]))
    return [
        _ladder(plain, np.concatenate([np.zeros((0, 4)), *own]))
        for plain, own in zip(expectation.plain, rungs, strict=True)
    ]


def _sorted(edges: list[tuple[np.ndarray, ...]]) -> np.ndarray:
    """``[n, 4]``: layer, column, cost and saving of each change, the best slope first."""
    slope, cost, saving, column = (np.concatenate(part) for part in zip(*edges, strict=True))
    layer = np.arange(len(slope)) % len(edges[0][0])
    # A layer's slopes fall from edge to edge, so a stable sort keeps its edges in order.
    order = np.argsort(-slope, kind="stable")
    order = order[slope[order] > 0.0]
    return np.stack([layer, column, cost, saving], axis=1)[order]


def _ladder(plain: np.ndarray, changes: np.ndarray) -> Ladder:
    loss = np.concatenate([[0.0], np.cumsum(changes[:, 2])]) / len(plain)
    active = plain.sum() - np.concatenate([[0.0], np.cumsum(changes[:, 3])])
    return Ladder(loss, active, changes[:, :2].astype(int))
