"""What the implementations of `apply_rule` on a GPU share: kernels that read a rule block."""

from __future__ import annotations

from typing import Protocol

import torch

from sere_sglang.ops.rule_block import block_of, classes_of
from sere_sglang.ops.rules_call import LostSlots, Routed, RuleCall


class ApplyInPlace(Protocol):
    def __call__(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor,
        scores: torch.Tensor | None,
        block: torch.Tensor,
        num_experts: int,
        *,
        expert_loss: torch.Tensor | None = None,
        row_class: torch.Tensor | None = None,
        counters: torch.Tensor | None = None,
        lost: LostSlots | None = None,
        active: torch.Tensor | None = None,
    ) -> None:
        """In place, at what `block` says on the device; may be captured in a CUDA graph.

        Args:
            ids: int32 ``[T, K]``, mutated, unit stride within a row; T and K at least 1.
            weights: float32 ``[T, K]``, likewise.
            scores: float32 ``[T, E]``, contiguous; None if no rule that `block` may name takes it.
            block: int32 ``[16]`` (rule_block.py).
            num_experts: E.
            expert_loss: float32 ``[E]`` of `RuleCall`, looked at where the block asks for what rows
                lost; or None.
            row_class: uint8 ``[>= T]``, or None: no row has a class.
            counters: int64 ``[7]`` to add to (`rules.Implementation`), or None.
            lost: `LostSlots.none`, written where the block asks for it; or None.
            active: zeros, bool ``[E]``, or None.
        """
        ...


def apply_copy(
    apply_: ApplyInPlace, call: RuleCall, counters: torch.Tensor | None = None
) -> Routed:
    """`rules.Implementation.apply` by kernels that change rows in place; not for ``similarity``."""
    device = call.ids.device
    ids, weights = call.ids.clone(), call.weights.clone()
    active = torch.zeros(call.num_experts, dtype=torch.bool, device=device)
    lost = LostSlots.none(ids)
    apply_(
        ids,
        weights,
        call.scores,
        block_of(call).to(device),
        call.num_experts,
        expert_loss=call.expert_loss,
        row_class=classes_of(call),
        counters=counters,
        lost=lost,
        active=active,
    )
    return Routed(ids, weights, active, lost.by_expert(call.num_experts))
