"""What re-routing is expected to do to a batch: active experts and loss, by rows, layer, S and rho.

From the profile alone, computed once when a server starts. Tokens are taken as independent draws
from the popularity of each rank (``popularity_by_rank``), so an expert is primary in a batch of n
rows with probability 1 - (1 - r)^n, and the best primary of an expert is the first of its
neighbours, by similarity, that is primary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sere_sglang.names import RULES, SIMILARITY
from sere_sglang.profile import SereProfile
from sere_sglang.profile.loss_shares import expert_loss
from sere_sglang.schedule.lookup import COMPUTED, present, representatives, row_of, spread
from sere_sglang.schedule.point import OperatingPoint
from sere_sglang.schedule.rule_tables import rule_tables

_QUANTILES = (0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
_NEAREST = 48  # neighbours of an expert that are looked at one by one
_CELLS = 32 * 128 * _NEAREST  # of all layers together: half a second
_COHERENT = 1 / 3
"""How far the errors of a token's slots point the same way: 0 not at all, 1 altogether. With this
one the measured KL of the demo model follows the loss over all S and batch sizes."""
_MAX_KEPT = 4096
_LOSSES, _NUM_LOSSES = (0.001, 0.5), 49  # of `energy`, 14 % from one to the next


@dataclass(frozen=True)
class LayerStatistics:
    """similarity: ``[E, E]``; by_rank: ``[K, E]``, probability that the slot of a rank holds e;
    energy: ``[K]``, share of the squared routing weight by rank, sums to 1. loss_share: of the
    loss budget of ``energy``; expert_loss: ``[E]``, of what is spent (`profile.loss_shares`)."""

    similarity: np.ndarray
    by_rank: np.ndarray
    energy: np.ndarray
    loss_share: float = 1.0
    expert_loss: np.ndarray | float = 1.0


@dataclass(frozen=True)
class Expectation:
    """Tables over batch sizes (`row_of` finds a batch's row), layers and points; float64.

    points: what the last axis stands for, all of one rule.
    plain: ``[rows, layers]`` active experts of exact routing.
    active: ``[rows, layers, points]`` the same after re-routing.
    loss: ``[rows, layers, points]`` expected squared error of the layer's output, of which each
        slot that moves gives its routing weight times the distance (1 - similarity) to its
        substitute, as a share of all squared routing weight. 0 is exact routing. Averaged over
        layers it is close to proportional to the KL divergence that re-routing causes
        (docs/scheduling.md). Of the other rules as `rule_tables` has it.
    """

    layer_ids: tuple[int, ...]
    points: tuple[OperatingPoint, ...]
    top_k: int
    plain: np.ndarray
    active: np.ndarray
    loss: np.ndarray
    layers: Mapping[int, LayerStatistics] = field(repr=False, compare=False)
    _others: dict[str, Expectation] = field(default_factory=dict, repr=False, compare=False)
    _effects: dict[tuple[int, OperatingPoint], tuple[float, float]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def num_layers(self) -> int:
        return len(self.layer_ids)

    @property
    def rule(self) -> str:
        return self.points[0].rule

    def of(self, rule: str) -> Expectation:
        """The same model's under another rule; computed when it is first asked for."""
        if rule == self.rule:
            return self
        if rule not in self._others:
            self._others[rule] = expect(self.layers, rule=rule)
        return self._others[rule]

    def row_of(self, batch: int) -> int:
        """Row of the tables for a batch of `batch` rows."""
        return row_of(batch)

    def plain_active(self, batch: int) -> float:
        """Active experts of exact routing, summed over the layers."""
        return float(self.plain[self.row_of(batch)].sum())

    def effect(self, batch: int, point: OperatingPoint) -> tuple[float, float]:
        """(active experts summed over the layers, loss averaged over them) of `batch` rows.

        A point need not be one of `points`: of the same S the nearest rho stands in, of ``energy``
        and ``budget`` the nearest loss or number of experts.
        """
        if point.enabled and point.rule != self.rule:
            return self.of(point.rule).effect(batch, point)
        row = self.row_of(batch)
        known = self._effects.get((row, point))
        if known is None:
            if len(self._effects) >= _MAX_KEPT:
                self._effects.clear()
            known = self._effects[row, point] = self._effect(row, point)
        return known

    def _effect(self, row: int, point: OperatingPoint) -> tuple[float, float]:
        active = loss = 0.0
        for i, layer in enumerate(self.layer_ids):
            own = point.at(layer)
            if not own.enabled:
                active += float(self.plain[row, i])
                continue
            column = self._column(own)
            active += float(self.active[row, i, column])
            loss += float(self.loss[row, i, column])
        return active, loss / self.num_layers

    def _column(self, own: OperatingPoint) -> int:
        same = [(abs(p.threshold - own.threshold) + abs(p.loss - own.loss)
                 + abs(p.experts - own.experts), i)
                for i, p in enumerate(self.points) if p.primary_k == own.primary_k]  # fmt: skip
        return min(same)[1]


def points_of(rule: str, top_k: int, experts: int) -> tuple[OperatingPoint, ...]:
    """Points of a rule beside ``similarity``, from mild to hard."""
    if rule == "energy":
        losses = np.geomspace(*_LOSSES, _NUM_LOSSES).round(6).tolist()
        return tuple(OperatingPoint(True, rule=rule, loss=loss) for loss in losses)
    if rule == "budget":
        return tuple(OperatingPoint(True, rule=rule, experts=b) for b in range(experts - 1, 0, -1))
    if rule in RULES:
        return tuple(OperatingPoint(True, s, rule=rule) for s in range(top_k - 1, 0, -1))
    raise ValueError(f"unknown rule {rule!r}; choose from {', '.join(RULES)}")


def statistics_of(profile: SereProfile) -> dict[int, LayerStatistics]:
    """Per MoE layer. A profile without popularity counts is read as uniform routing."""
    layers = {}
    for layer, similarity in profile.similarity.items():
        table = profile.tables.get(layer, {})
        counts, weights = table.get("popularity_by_rank"), table.get("weight_by_rank")
        cost = expert_loss(table)
        experts, top_k = similarity.shape[0], profile.metadata.top_k or 2
        if counts is None:
            by_rank = np.full((top_k, experts), 1.0 / experts)
        else:
            by_rank = counts.double().numpy()
            by_rank = by_rank / np.maximum(by_rank.sum(axis=1, keepdims=True), 1.0)
        # Not counted by every tool that writes profiles: assume that weights fall linearly.
        energy = (np.arange(top_k, 0, -1.0) if weights is None else weights.double().numpy()) ** 2
        layers[layer] = LayerStatistics(
            similarity.double().numpy(),
            by_rank,
            energy / max(energy.sum(), 1e-30),
            profile.loss_shares[layer],
            1.0 if cost is None else cost.double().numpy(),
        )
    return layers


def thresholds_of(layers: Mapping[int, LayerStatistics]) -> tuple[float, ...]:
    """rho worth considering: 0, and quantiles of this model's own similarities."""
    pairs = np.concatenate([_upper(layer.similarity) for layer in layers.values()])
    found = {round(float(rho), 3) for rho in np.quantile(pairs, _QUANTILES)}
    return (0.0, *sorted(rho for rho in found if 0.0 < rho <= 1.0))


def expect(
    layers: Mapping[int, LayerStatistics],
    thresholds: Sequence[float] | None = None,
    rule: str = SIMILARITY,
) -> Expectation:
    """Tables for every S in 1..K-1 and rho of `thresholds` (default: `thresholds_of`); of another
    rule for `points_of` it.

    In very large models some layers, evenly spaced, stand for their neighbours.
    """
    ids = sorted(layers)
    experts = len(layers[ids[0]].similarity)
    chosen, nearest = representatives(ids, _CELLS // (experts * _NEAREST))
    looked_at = {i: layers[i] for i in chosen}
    top_k = layers[ids[0]].by_rank.shape[0]
    if rule == SIMILARITY:
        thresholds = thresholds_of(looked_at) if thresholds is None else thresholds
        points = tuple(OperatingPoint(True, s, rho) for s in range(1, top_k) for rho in thresholds)
        tables = [_tables_of(layer, thresholds) for layer in looked_at.values()]
    else:
        points = points_of(rule, top_k, experts)
        tables = [
            rule_tables(own.by_rank, own.energy, points, own.loss_share, own.expert_loss)
            for own in looked_at.values()
        ]
    plain, active, loss = (
        spread(np.stack([own[i] for own in tables], axis=1)[:, nearest]) for i in range(3)
    )
    return Expectation(tuple(ids), points, top_k, plain, active, loss, layers)


def _tables_of(
    layer: LayerStatistics, thresholds: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """plain ``[rows]``, active and loss ``[rows, points]`` of one layer, at `COMPUTED`."""
    top_k = len(layer.by_rank)
    neighbours = _Neighbours(layer.similarity, thresholds)
    plain = present(layer.by_rank.sum(axis=0), np.array(COMPUTED)).sum(axis=0)
    active = np.zeros((len(COMPUTED), top_k - 1, len(thresholds)))
    loss = np.zeros_like(active)
    for s in range(1, top_k):
        votes = layer.by_rank[:s].sum(axis=0)
        secondary = layer.by_rank[s:]
        used = secondary.sum(axis=0)  # probability that a row has e in a secondary slot
        energy = layer.energy[s:]
        for i, n in enumerate(COMPUTED):
            primary = present(votes, n)
            moved, distance, squared = neighbours.of_best_primary(primary)
            # No row votes for e and one has it in a secondary slot.
            outside = np.clip(present(votes + used, n) - primary, 0.0, None)
            active[i, s - 1] = primary.sum() + outside @ (1.0 - moved)
            # The row that has e in a secondary slot does not vote for it; the others may.
            moves = secondary * (1.0 - present(votes, n - 1))
            slots = np.sqrt(energy)[:, None] * (moves @ distance)  # error by rank and threshold
            together = slots.sum(axis=0) ** 2 - (slots**2).sum(axis=0)
            loss[i, s - 1] = energy @ (moves @ squared) + _COHERENT * together
    rows = len(COMPUTED)
    return plain, active.reshape(rows, -1), loss.reshape(rows, -1)


class _Neighbours:
    """Every expert's neighbours by similarity: the nearest one by one, the others by their mean."""

    def __init__(self, similarity: np.ndarray, thresholds: Sequence[float]) -> None:
        experts = len(similarity)
        matrix = np.array(similarity, dtype=np.float64)
        np.fill_diagonal(matrix, -1.0)  # an expert that is primary itself does not move
        order = np.argsort(-matrix, axis=1, kind="stable")[:, : experts - 1]
        best = np.take_along_axis(matrix, order, axis=1)
        kept = min(_NEAREST, experts - 1)
        self._nearest = order[:, :kept]
        lost = (1.0 - best).astype(np.float32)
        self._lost = lost[:, :kept]
        self._lost_squared = self._lost**2
        # Of each expert's neighbours, the first so many reach the threshold: [E, thresholds].
        near = np.stack(
            [(best >= rho).sum(axis=1) if rho > 0 else np.full(experts, experts - 1)
             for rho in thresholds], axis=1,
        )  # fmt: skip
        self._near = np.minimum(near, kept)
        self._everyone = np.arange(experts)[:, None]
        # Over the far ones: share, distance and its square of those that reach the threshold.
        beyond = np.maximum(near, kept)
        self._far = [
            (sums[self._everyone, beyond] - sums[:, [kept]]) / max(experts - 1 - kept, 1)
            for sums in (_running_sum(x) for x in (np.ones_like(lost), lost, lost**2))
        ]

    def of_best_primary(self, primary: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For `primary` ``[E]``, the probability of each expert to be in P, which is not empty.

        Three times ``[E, thresholds]``: probability that an expert outside P moves, and the
        expected distance and squared distance to where it moves (0 where it stays).
        """
        # Row e, column j: the j-th neighbour of e is primary and no nearer one is.
        first = primary.astype(np.float32)[self._nearest]
        first[:, 1:] *= np.cumprod(1.0 - first, axis=1)[:, :-1]
        absent = np.log1p(-np.minimum(primary, 1.0 - 1e-9))
        some = -np.expm1(absent.sum() - absent)[:, None]  # any expert but e is primary
        far = np.clip(some - first.sum(axis=1, keepdims=True), 0.0, None)
        return tuple(
            (_running_sum(near)[self._everyone, self._near] + far * beyond)
            / np.maximum(some, 1e-12)
            for near, beyond in zip(
                (first, first * self._lost, first * self._lost_squared), self._far, strict=True
            )
        )  # type: ignore[return-value]


def _running_sum(table: np.ndarray) -> np.ndarray:
    """``[rows, n + 1]``: column c sums the first c columns."""
    sums = np.zeros((table.shape[0], table.shape[1] + 1), dtype=table.dtype)
    np.cumsum(table, axis=1, out=sums[:, 1:])
    return sums


def _upper(matrix: np.ndarray) -> np.ndarray:
    return matrix[np.triu_indices(len(matrix), 1)]
