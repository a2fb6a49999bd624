"""Rows stay distinct (docs/semantics.md, rule 8), in torch: for `reference`.

Shapes depend on nothing but the inputs' shapes and nothing is read back from the device. T rows, K
slots, E experts; ``members`` bool ``[E]`` is A.
"""

from __future__ import annotations

import torch


def merge_slots(
    ids: torch.Tensor, weights: torch.Tensor, live: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the `live` slots that hold one expert the lowest gets the weight of all.

    Args:
        ids: int64 ``[T, K]``.
        weights: float32 ``[T, K]``.
        live: bool ``[T, K]``: slots that hold an expert.

    Returns:
        Weights float32 ``[T, K]``, right where the second, bool ``[T, K]``, says that a slot is the
        lowest that holds its expert. The other live ones are free.
    """
    same = (ids[:, :, None] == ids[:, None, :]) & live[:, None, :]
    merged = sum_slots(weights[:, None, :].expand_as(same), same)
    return merged, ~same.tril(-1).any(dim=2) & live


def fill_free_slots(
    members: torch.Tensor,
    own: torch.Tensor,
    live: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    taken: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Live slots that are not `taken` get unused members of A, lowest first; then own experts.

    Args:
        own: int64 ``[T, K]``: what the slots held before the rule.
        live: bool ``[T, K]``: slots that hold an expert and may change.
        ids, weights: int64, float32 ``[T, K]``, for the `taken` slots, bool ``[T, K]``.

    Returns:
        Ids and weights ``[T, K]`` of all live slots.
    """
    num_experts = members.shape[0]
    own_in = members[own.where(live, 0)] & live
    freed = live & ~taken
    unused = members & ~in_row(ids, taken, num_experts)
    nth = (freed.cumsum(dim=1) - 1).clamp(min=0)
    fits = freed & (nth < unused.sum(dim=1, keepdim=True))
    lowest = unused.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    filler = lowest.gather(1, nth.clamp(max=num_experts - 1))

    # The row holds all of A: a surplus slot keeps its own expert, unless that is in A, and so in
    # the row; then it takes one of the row's that another slot gave up.
    surplus = freed & ~fits
    takes = surplus & own_in
    given_up = live & ~own_in & ~surplus
    donors = given_up.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    donor = donors.gather(1, (takes.cumsum(dim=1) - 1).clamp(min=0))
    # A row in which an expert was given twice may have fewer donors than it needs.
    takes &= takes.cumsum(dim=1) <= given_up.sum(dim=1, keepdim=True)
    rest = filler.where(fits, own.gather(1, donor).where(takes, own))
    return rest.where(freed, ids), weights.where(taken, 0.0)


def lowest_members(members: torch.Tensor, top_k: int) -> torch.Tensor:
    """int64 ``[K]``: the lowest of A, ascending, and its lowest again where A is smaller."""
    slot = torch.arange(top_k, device=members.device)
    ascending = members.to(torch.uint8).argsort(descending=True, stable=True)
    return ascending[slot.where(slot < members.sum(), 0)]


def in_row(ids: torch.Tensor, slots: torch.Tensor, num_experts: int) -> torch.Tensor:
    """bool ``[T, E]``: what a row holds in `slots`, bool ``[T, K]``."""
    found = torch.zeros((ids.shape[0], num_experts + 1), dtype=torch.bool, device=ids.device)
    found.scatter_(1, ids.where(slots, num_experts), True)
    return found[:, :num_experts]


def sum_slots(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, float32, one slot after the other as the C++ does."""
    total = torch.zeros(values.shape[:-1], dtype=torch.float32, device=values.device)
    for k in range(values.shape[-1]):
        total = total + values[..., k].where(where[..., k], 0.0)
    return total
