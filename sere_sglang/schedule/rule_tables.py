"""What the rules beside ``similarity`` are expected to do to a batch of one layer.

They decide from all of a batch's weights together, which no closed form follows: batches are drawn
from the popularity of each rank, with the mean squared weight of that rank, and the rule is applied
to them. The draws are the same in every process, so ranks that must decide alike do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sere_sglang.schedule.lookup import COMPUTED
from sere_sglang.schedule.point import OperatingPoint

_SLOTS = 4096  # drawn per batch size, in batches: at least _BATCHES[0] and at most _BATCHES[1]
_BATCHES = (4, 64)


def rule_tables(
    by_rank: np.ndarray,
    energy: np.ndarray,
    points: Sequence[OperatingPoint],
    loss_share: float = 1.0,
    expert_loss: np.ndarray | float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """plain ``[rows]``, active and loss ``[rows, points]`` of one layer, at `COMPUTED`.

    Args:
        by_rank: ``[K, E]``, probability that the slot of a rank holds an expert.
        energy: ``[K]``, share of the squared routing weight by rank.
        points: all of one rule.
        loss_share: what the layer multiplies a budget of ``energy`` by.
        expert_loss: ``[E]``, what it multiplies an expert's squared weight by.

    loss is the squared weight that a row's dropped slots had, as a share of the square of all its
    weight. Of ``energy`` it is what a point may spend, before the layer's share: the kernel never
    drops more.
    """
    amplitude = np.sqrt(energy)
    shares = (amplitude / max(amplitude.sum(), 1e-30)) ** 2  # [K], of a row's squared total weight
    rows = len(COMPUTED)
    plain = np.zeros(rows)
    active, loss = np.zeros((rows, len(points))), np.zeros((rows, len(points)))
    edges = np.cumsum(by_rank, axis=1)
    for i, batch in enumerate(COMPUTED):
        batches = int(np.clip(_SLOTS // (batch * len(shares)), *_BATCHES))
        drawn = [
            _Batch(_draw(edges, batch, seed), shares, by_rank, loss_share, expert_loss)
            for seed in range(batches)
        ]
        plain[i] = np.mean([one.used.sum() for one in drawn])
        effects = np.mean([one.effects(points) for one in drawn], axis=0)
        active[i], loss[i] = effects[:, 0], effects[:, 1]
    # More skipping never loads more: what the draws say against it is their noise.
    return plain, np.minimum.accumulate(active, axis=1), np.maximum.accumulate(loss, axis=1)


def _draw(edges: np.ndarray, batch: int, seed: int) -> np.ndarray:
    """int ``[n, K]``: an expert for each rank of each row."""
    chance = np.random.default_rng((seed, batch)).random((batch, len(edges)))
    ids = [
        np.searchsorted(own, column * own[-1]) for own, column in zip(edges, chance.T, strict=True)
    ]
    return np.stack(ids, axis=1).clip(max=edges.shape[1] - 1)


class _Batch:
    """One drawn batch. spread: ``[K, E]``, its squared weight by rank and expert, per row."""

    def __init__(
        self,
        ids: np.ndarray,
        shares: np.ndarray,
        by_rank: np.ndarray,
        loss_share: float,
        expert_loss: np.ndarray | float,
    ) -> None:
        self.loss_share, self.expert_loss = loss_share, expert_loss
        batch, experts = len(ids), by_rank.shape[1]
        self.held = np.stack([np.bincount(own, minlength=experts) for own in ids.T])
        self.spread = self.held * (shares / batch)[:, None]
        self.used = self.held.any(axis=0)
        self.value = self.spread.sum(axis=0)

    def effects(self, points: Sequence[OperatingPoint]) -> np.ndarray:
        """``[points, 2]``: active experts, loss."""
        rule = points[0].rule
        if rule == "energy":
            return self._within_loss(np.array([p.loss for p in points]))
        if rule == "budget":
            return self._within_budget(np.array([p.experts for p in points]))
        out = []
        for point in points:
            members = self.held[: point.primary_k].any(axis=0)
            lost = self.spread[:, ~members].sum()
            if rule == "topk":
                lost = self.spread[point.primary_k :].sum()
            out.append((members.sum(), lost))
        return np.array(out, dtype=float)

    def _within_loss(self, allowed: np.ndarray) -> np.ndarray:
        droppable = self.used & ~self.held[:1].any(axis=0)
        spent = np.cumsum(np.sort((self.value * self.expert_loss)[droppable]))
        active = self.used.sum() - np.searchsorted(spent, allowed * self.loss_share, side="right")
        return np.stack([active, allowed], axis=1)

    def _within_budget(self, most: np.ndarray) -> np.ndarray:
        """By summed score, for which the weights stand in: the profile has no scores."""
        first = self.held[:1].any(axis=0)
        order = np.argsort(-np.where(first, np.inf, self.value), kind="stable")
        kept = np.cumsum(self.value[order])
        active = np.maximum(most, first.sum())
        return np.stack([active, np.clip(kept[-1] - kept[active - 1], 0.0, None)], axis=1)
