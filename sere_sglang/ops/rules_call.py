"""What a rule is given and what it gives back: shared by `rules` and its implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

CODES = {"similarity": 0, "piggyback": 1, "budget": 2, "topk": 3, "energy": 4}
"""Rule -> `Rule` of csrc/rules_core.h."""

FILLS = ("piggyback", "truncate")

FRACTION_BITS = 32
"""Sums over rows are int64 of this many binary places: they do not depend on the order of rows.

The resolution is 2^-32 (2.3e-10), so a weight below 1.07e-5 has no energy. What a slot adds is at
most `LARGEST_TERM`, which is 2^12 in units of weight squared: the running sum over all experts that
`energy` spends, of `MAX_ROWS` rows of 32 slots, stays below 2^63.
"""
LARGEST_TERM = 1 << 44
MAX_ROWS = 8192


class Routed(NamedTuple):
    """One layer's choices after a rule. T rows, K slots, E experts."""

    ids: torch.Tensor
    """int32 ``[T, K]``; distinct within a row."""
    weights: torch.Tensor
    """float32 ``[T, K]``"""
    active: torch.Tensor
    """bool ``[E]``: the experts that some valid row holds now, which is what a layer loads."""
    lost: torch.Tensor | None
    """float32 ``[T, E]``: routing weight of a row's slots whose expert is not in A, before the
    rule; what a surrogate would compensate. None if the rule was off."""


class LostSlots(NamedTuple):
    """`Routed.lost` by slot, as a layer's kernels hand it on: T rows, K slots."""

    weights: torch.Tensor
    """float32 ``[T, K]``; 0 where nothing was lost."""
    experts: torch.Tensor
    """int32 ``[T, K]``: whose weight it was."""

    @classmethod
    def none(cls, ids: torch.Tensor) -> LostSlots:
        """Of rows `ids` ``[T, K]`` that have lost nothing yet."""
        both = torch.zeros(2, *ids.shape, dtype=torch.int32, device=ids.device)  # one launch
        return cls(both[0].view(torch.float32), both[1])

    def by_expert(self, num_experts: int) -> torch.Tensor:
        """float32 ``[T, E]``."""
        lost = torch.zeros(self.weights.shape[0], num_experts, device=self.weights.device)
        return lost.scatter_add_(1, self.experts.to(torch.int64), self.weights)


@dataclass(frozen=True)
class RuleCall:
    """Checked arguments of one call: tensors contiguous and on one device, options in range."""

    rule: str
    ids: torch.Tensor  # int32 [T, K], not to be written
    weights: torch.Tensor  # float32 [T, K], not to be written
    num_experts: int
    num_valid: int
    protected: torch.Tensor | None = None  # bool [T]
    fast: torch.Tensor | None = None  # bool [T]; not of `similarity`
    scores: torch.Tensor | None = None  # float32 [T, E]
    similarity: torch.Tensor | None = None  # float32 [E, E]
    expert_loss: torch.Tensor | None = None  # float32 [E], of `energy` alone
    keep: int = 1  # S of `similarity`, k0 of `piggyback` and `topk`, else 1
    fast_keep: int = 1  # the same of fast rows
    threshold: float = 0.0
    budget: int = 1  # B
    warmup: bool = True
    truncate: bool = False
    loss: float = 0.0  # a float32, as the next two
    fill_weight: float = 0.0
    renormalize: float = 0.0

    @property
    def is_off(self) -> bool:
        """``similarity`` with an S that moves nothing."""
        return self.rule == "similarity" and not 0 < self.keep < self.ids.shape[1]

    @property
    def loss_limit(self) -> int:
        """The loss budget in units of the fixed-point sums: exact, loss being a float32."""
        return int(self.loss * self.num_valid * (1 << FRACTION_BITS))
