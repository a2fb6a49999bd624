"""``impl="torch"``: re-routing in plain torch operations, on any device.

The readable statement of the algorithm and the fallback everywhere. Shapes depend on nothing but
the inputs' shapes and nothing is read back from the device, so a CUDA graph may capture it.
"""

from __future__ import annotations

import torch

from sere_sglang.ops import control as ctl
from sere_sglang.ops.distinct import fill_free_slots, lowest_members, merge_slots
from sere_sglang.ops.table import LayerTable


def is_available(device_type: str) -> str | None:
    """Every device will do."""
    return None


def build() -> None:
    """Nothing to compile."""


def reroute_(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    table: LayerTable,
    control: torch.Tensor,
    row_class: torch.Tensor | None,
    counters: torch.Tensor | None,
    distinct: bool,
) -> None:
    """See `sere_sglang.ops.reroute_`; arguments are validated there."""
    num_tokens, top_k = topk_ids.shape
    device = topk_ids.device
    ids = topk_ids.to(torch.int64)
    routed = (ids >= 0) & (ids < table.num_experts)
    ids_or_zero = ids.where(routed, 0)

    active, row_k, row_rho = _row_settings(control, row_class, num_tokens, top_k)
    num_valid = control[ctl.WORD_NUM_VALID]
    valid = (num_valid < 0) | (torch.arange(num_tokens, device=device) < num_valid)
    valid_slot = valid[:, None] & routed
    primary_slot = rank_slots(topk_ids, topk_weights) < row_k[:, None]

    primary = expert_set(ids, valid_slot & primary_slot, table.num_experts)
    best, best_id = _best_primary(table.similarity, primary)

    # A protected row has S = K: all its slots are primary, so none of them is a candidate.
    candidate = valid_slot & ~primary_slot & ~primary[ids_or_zero] & primary.any() & active
    critical = candidate & (row_rho > 0)[:, None] & (best[ids_or_zero] < row_rho[:, None])
    moves = candidate & ~critical
    new_ids = torch.where(moves, best_id[ids_or_zero], ids)

    weights = topk_weights
    if weights is not None and table.scale is not None:
        factor = table.scale[ids_or_zero, new_ids.where(moves, 0)]
        weights = torch.where(moves, weights * factor, weights)
    members = expert_set(new_ids, valid_slot, table.num_experts)  # A
    if counters is not None:
        before = expert_set(ids, valid_slot, table.num_experts).sum()
        rows = valid.sum()
        step = [(rows > 0).long(), rows, before, members.sum(), moves.sum(), critical.sum()]
        counters.add_(torch.stack(step) * active)
    if distinct and weights is not None:
        changes = moves.any(dim=1, keepdim=True) & routed  # other rows stay exactly as they are
        merged, taken = merge_slots(new_ids, weights, changes)
        placed, merged = fill_free_slots(members, ids, changes, new_ids, merged, taken)
        new_ids = placed.where(changes, new_ids)
        weights = merged.where(changes, weights)
    if topk_weights is not None and weights is not None and weights is not topk_weights:
        topk_weights.copy_(weights)

    pads = ~valid & primary.any() & active
    padding_ids = _padding_ids(new_ids, valid, members if distinct else primary, distinct)
    topk_ids.copy_(torch.where(pads[:, None], padding_ids, new_ids))


def _row_settings(
    control: torch.Tensor, row_class: torch.Tensor | None, num_tokens: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whether anything may change at all, and S int32 ``[T]``, rho float32 ``[T]`` per row."""
    num_classes = control[ctl.WORD_NUM_CLASSES].clamp(1, ctl.MAX_CLASSES)
    class_k = control[ctl.WORD_PRIMARY_K : ctl.WORD_PRIMARY_K + ctl.MAX_CLASSES]
    class_rho = control[ctl.WORD_THRESHOLD : ctl.WORD_THRESHOLD + ctl.MAX_CLASSES]
    class_rho = class_rho.view(torch.float32)
    in_use = torch.arange(ctl.MAX_CLASSES, device=control.device) < num_classes

    some_class_moves = (in_use & (class_k < top_k)).any()
    only_class_is_off = (num_classes == 1) & (class_k[0] <= 0)
    active = (control[ctl.WORD_ENABLED] != 0) & some_class_moves & ~only_class_is_off

    if row_class is None:
        index = torch.zeros(num_tokens, dtype=torch.int64, device=control.device)
    else:
        index = torch.minimum(row_class[:num_tokens].to(torch.int64), num_classes - 1)
    return active, class_k.clamp(min=1)[index], class_rho[index]


def rank_slots(topk_ids: torch.Tensor, topk_weights: torch.Tensor | None) -> torch.Tensor:
    """Rank of every slot in its row: weight descending, ties by slot order."""
    slot = torch.arange(topk_ids.shape[1], device=topk_ids.device)
    if topk_weights is None:
        return slot.expand_as(topk_ids)
    mine, other = topk_weights[:, :, None], topk_weights[:, None, :]
    earlier = slot[None, None, :] < slot[None, :, None]
    return ((other > mine) | ((other == mine) & earlier)).sum(dim=2)


def expert_set(ids: torch.Tensor, member: torch.Tensor, num_experts: int) -> torch.Tensor:
    """bool ``[E]``: the experts of the slots where `member` holds."""
    # One expert too many, as the place where the other slots write.
    found = torch.zeros(num_experts + 1, dtype=torch.bool, device=ids.device)
    found.scatter_(0, ids.where(member, num_experts).flatten(), True)
    return found[:num_experts]


def _best_primary(
    similarity: torch.Tensor, primary: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every expert its highest similarity within P, and the lowest id that has it."""
    among = torch.where(primary, similarity, float("-inf"))
    best_id = among.argmax(dim=1)  # documented to return the first maximum
    return among.gather(1, best_id[:, None]).squeeze(1), best_id


def _padding_ids(
    ids: torch.Tensor, valid: torch.Tensor, active: torch.Tensor, distinct: bool
) -> torch.Tensor:
    """Ids ``[1, K]`` for padding rows: experts that are `active` anyway, and never -1."""
    usable = valid & (ids >= 0).all(dim=1)
    first_usable = usable.to(torch.uint8).argmax().view(1)
    lowest = lowest_members(active, ids.shape[1] if distinct else 1)
    return torch.where(usable.any(), ids.index_select(0, first_usable), lowest)
