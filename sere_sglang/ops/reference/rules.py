"""``impl="torch"`` of `apply_rule`: the rules in plain torch operations, on any device.

The readable statement of docs/semantics.md, "Rules beside similarity". Shapes depend on nothing but
the inputs' shapes and nothing is read back from the device.
"""

from __future__ import annotations

import torch

from sere_sglang.ops.distinct import (
    fill_free_slots,
    in_row,
    lowest_members,
    merge_slots,
    sum_slots,
)
from sere_sglang.ops.reference.reroute import expert_set, rank_slots
from sere_sglang.ops.reroute import reroute
from sere_sglang.ops.rules_call import FRACTION_BITS, LARGEST_TERM, Routed, RuleCall


def is_available(device_type: str) -> str | None:
    """Every device will do."""
    return None


def build() -> None:
    """Nothing to compile."""


def apply(
    call: RuleCall, counters: torch.Tensor | None = None, *, reroute_impl: str = "torch"
) -> Routed:
    """See `Implementation.apply`. reroute_impl: of `reroute`, which finds SERE's stand-ins."""
    batch = _Batch(call, reroute_impl)
    routed = batch.routed()
    if counters is not None:
        batch.count(routed, counters)
    return routed


class _Batch:
    """The masks that every rule reads, and the steps that lead from them to new rows."""

    def __init__(self, call: RuleCall, reroute_impl: str) -> None:
        self.call = call
        self.reroute_impl = reroute_impl
        self.ids = call.ids.to(torch.int64)  # [T, K]
        self.weights = call.weights
        num_rows = self.ids.shape[0]
        self.routed_slot = (self.ids >= 0) & (self.ids < call.num_experts)
        self.index = self.ids.where(self.routed_slot, 0)
        rows = torch.arange(num_rows, device=self.ids.device)
        self.valid = rows < call.num_valid
        kept = torch.zeros_like(self.valid) if call.protected is None else call.protected
        self.protected = self.valid & kept
        self.changes = (self.valid & ~kept)[:, None] & self.routed_slot  # slots a rule may change
        self.rank = rank_slots(self.ids, self.weights)
        fast = torch.zeros_like(self.valid) if call.fast is None else call.fast
        self.speaks = (self.valid & ~fast)[:, None]  # rows that sums over rows are taken of
        sure = torch.full_like(rows, call.keep).where(~fast, call.fast_keep)
        self.sure = self.rank < sure[:, None]
        self.mass = sum_slots(self.weights, self.routed_slot)

    def routed(self) -> Routed:
        members = self._members()
        some = members.any()
        changes = self.changes & some
        own_in = members[self.index] & self.routed_slot
        placed, weights, taken = self._place(members, own_in)
        placed, weights = fill_free_slots(members, self.ids, changes, placed, weights, taken)
        ids = placed.where(changes, self.ids)
        weights = weights.where(changes, self.weights)

        lost = torch.zeros(
            (ids.shape[0], self.call.num_experts), dtype=torch.float32, device=ids.device
        )
        lost.scatter_add_(1, self.index, self.weights.where(changes & ~own_in, 0.0))
        pads = (~self.valid)[:, None] & some
        padding_ids, padding_weights = self._padding(ids, weights, members)
        ids = padding_ids.where(pads, ids)
        weights = padding_weights.where(pads, weights)
        held = self.valid[:, None] & self.routed_slot
        active = expert_set(ids, held, self.call.num_experts)
        return Routed(ids.to(torch.int32), weights, active, lost)

    def count(self, routed: Routed, counters: torch.Tensor) -> None:
        """Add to `counters` what this batch did."""
        call = self.call
        held = self.valid[:, None] & self.routed_slot
        assert routed.lost is not None
        some = self.valid.any().to(torch.int64)
        before = expert_set(self.ids, held, call.num_experts).sum()
        now = routed.ids.to(torch.int64)
        loaded = expert_set(now, held & (routed.weights != 0.0), call.num_experts).sum()
        moved = ((routed.ids != call.ids) & held).sum()
        squares = routed.lost * routed.lost
        if call.expert_loss is not None:
            squares = squares * call.expert_loss
        lost = (
            (_fixed(squares) * self.speaks)
            .sum()
            .div(self.valid.sum().clamp(min=1), rounding_mode="floor")
        )
        step = [some, self.valid.sum(), before, loaded, moved, torch.zeros_like(some)]
        counters += torch.stack([*step, lost])

    # ---- set A

    def _members(self) -> torch.Tensor:
        """bool ``[E]``: A."""
        call = self.call
        live = self.valid[:, None] & self.routed_slot
        first = live & (self.sure | self.protected[:, None])
        members = expert_set(self.ids, first, call.num_experts)
        if call.rule == "similarity":
            # P and the critical experts; where P is empty nothing changes.
            after = self._moved()
            return expert_set(after, live, call.num_experts) & members.any()
        if call.rule == "budget":
            return self._within_budget(members, live)
        if call.rule == "energy":
            return self._within_loss(members, live)
        return members

    def _within_budget(self, first: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        call = self.call
        assert call.scores is not None
        if not call.warmup:
            first = expert_set(self.ids, live & self.protected[:, None], call.num_experts)
        summed = (_fixed(call.scores) * self.speaks).sum(dim=0)
        # Those that are in already come first, the others by their sum; ties by the lowest id.
        order = summed.where(~first, torch.iinfo(torch.int64).max).argsort(
            descending=True, stable=True
        )
        place = torch.empty_like(order)
        place[order] = torch.arange(call.num_experts, device=order.device)
        return (first | (place < call.budget)) & live.any()

    def _within_loss(self, stay: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        call = self.call
        used = expert_set(self.ids, live, call.num_experts)
        energy = torch.zeros(call.num_experts, dtype=torch.int64, device=self.ids.device)
        squares = self.weights * self.weights
        if call.expert_loss is not None:
            squares = squares * call.expert_loss[self.index]
        terms = _fixed(squares) * (self.changes & self.speaks)
        energy.scatter_add_(0, self.index.flatten(), terms.flatten())
        droppable = used & ~stay
        value, order = energy.where(droppable, torch.iinfo(torch.int64).max).sort(stable=True)
        spent = value.where(droppable[order], 0).cumsum(dim=0)
        dropped = torch.empty_like(droppable)
        dropped[order] = droppable[order] & (spent <= call.loss_limit)
        return used & ~dropped

    # ---- what a row holds of A, in which slot and with which weight

    def _place(
        self, members: torch.Tensor, own_in: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids and weights ``[T, K]``, and which of the slots they are said for."""
        call = self.call
        if call.rule == "similarity":
            return self._meet()
        if call.rule == "topk":
            return self._keep(self.sure & self.routed_slot, exponent=1.0)
        if call.rule == "energy":
            return self._keep_and_fill(members, own_in)
        if call.truncate:
            return self._keep(own_in, exponent=1.0)
        nothing = torch.zeros_like(own_in)
        ids, scores, taken = self._next_best(members, nothing, self.routed_slot)
        factor = _ratio(self.mass, sum_slots(scores, taken), otherwise=0.0)
        return ids, scores * factor[:, None], taken

    def _moved(self) -> torch.Tensor:
        call = self.call
        assert call.similarity is not None
        return reroute(
            call.ids,
            call.similarity,
            primary_k=call.keep,
            threshold=call.threshold,
            topk_weights=call.weights,
            num_valid=call.num_valid,
            protected=call.protected,
            impl=self.reroute_impl,
        ).to(torch.int64)

    def _meet(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slots that met on one expert: all their weight in the lowest of them."""
        ids = self._moved()
        return ids, *merge_slots(ids, self.weights, self.routed_slot)

    def _keep(
        self, kept: torch.Tensor, exponent: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Own experts only, their weights scaled towards the row's original mass."""
        return self.ids, self._scaled(self.weights, kept, kept, exponent), kept

    def _keep_and_fill(
        self, members: torch.Tensor, own_in: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        call = self.call
        if call.fill_weight == 0.0:
            return self._keep(own_in, call.renormalize)
        assert call.scores is not None
        own_scores = call.scores.gather(1, self.index)
        unit = _ratio(self.mass, sum_slots(own_scores, self.routed_slot), otherwise=0.0)
        ids, scores, filled = self._next_best(members, own_in, self.routed_slot & ~own_in)
        ids = self.ids.where(own_in, ids)
        weights = self.weights.where(own_in, scores * unit[:, None] * call.fill_weight)
        taken = own_in | filled
        return ids, self._scaled(weights, taken, own_in, call.renormalize), taken

    def _scaled(
        self, weights: torch.Tensor, taken: torch.Tensor, own: torch.Tensor, exponent: float
    ) -> torch.Tensor:
        """Times (original mass / new mass)^exponent, in rows that lost a slot."""
        if exponent == 0.0:
            return weights
        ratio = _ratio(self.mass, sum_slots(weights, taken), otherwise=1.0)
        factor = ratio if exponent == 1.0 else ratio.clamp(min=0.0).pow(exponent)
        lossless = (own | ~self.routed_slot).all(dim=1)
        return weights * factor.where(~lossless, 1.0)[:, None]

    def _next_best(
        self, members: torch.Tensor, held: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For `slots`, in slot order, the row's best of A by score that it does not hold yet.

        Returns ids, scores, and which of the slots got one (A may be too small).
        """
        scores = self.call.scores
        assert scores is not None
        wanted = members & ~in_row(self.ids, held, self.call.num_experts)
        value, order = scores.where(wanted, float("-inf")).sort(dim=1, descending=True, stable=True)
        nth = (slots.cumsum(dim=1) - 1).clamp(min=0)
        filled = slots & (nth < wanted.sum(dim=1, keepdim=True))
        nth = nth.clamp(max=self.call.num_experts - 1)
        return order.gather(1, nth), value.gather(1, nth).where(filled, 0.0), filled

    def _padding(
        self, ids: torch.Tensor, weights: torch.Tensor, members: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights ``[1, K]``: the first valid row without an empty slot, or A's lowest."""
        usable = self.valid & self.routed_slot.all(dim=1)
        first = usable.to(torch.uint8).argmax().view(1)
        lowest = lowest_members(members, ids.shape[1])
        some = usable.any()
        row_weights = weights.index_select(0, first).where(some, 0.0)
        return ids.index_select(0, first).where(some, lowest[None]), row_weights


def _ratio(above: torch.Tensor, below: torch.Tensor, otherwise: float) -> torch.Tensor:
    empty = below == 0.0
    return (above / below.where(~empty, 1.0)).where(~empty, otherwise)


def _fixed(values: torch.Tensor) -> torch.Tensor:
    """int64, nearest, ties to even: scaling by a power of two is exact."""
    scaled = (values * float(1 << FRACTION_BITS)).round()
    largest = float(LARGEST_TERM)  # also of a square beyond float32 times a loss of 0
    return scaled.nan_to_num(nan=largest).clamp(max=largest).to(torch.int64)
