"""``impl="triton"`` of `apply_rule`: the rules on a GPU.

Under ``TRITON_INTERPRET=1`` it serves CPU tensors too, slowly, which is how it is tested without a
GPU. ``similarity`` has kernels of its own (reroute.py), to which this adds what `Routed` says.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from sere_sglang.ops.jit import BuildError
from sere_sglang.ops.reference import rules as reference
from sere_sglang.ops.rule_block import encode_rule
from sere_sglang.ops.rules_call import LostSlots, Routed, RuleCall
from sere_sglang.ops.rules_device import apply_copy
from sere_sglang.ops.triton import reroute as rerouting
from sere_sglang.ops.triton import rule_kernels as kernels
from sere_sglang.ops.triton.phases import SCRATCH_ROWS
from sere_sglang.ops.triton.rule_phases import TOTAL_SUMS

is_available = rerouting.is_available

ONE_PROGRAM_SCORES = 0 if torch.version.hip else 4096
"""Up to so many scores (rows times padded E), and `ONE_PROGRAM_EXPERTS`, one program does it all in
one launch (reroute.py says why not on AMD)."""
ONE_PROGRAM_EXPERTS = 256

SMALL_TILE_SLOTS = 512
LARGE_TILE_SLOTS = 2048
WIDE_TILE = 4096  # scores that the one program looks at together: all of them
SMALL_WIDE_TILE = 1024  # if they are so few, and each of many programs
CHOOSE_TILE = 4096  # pairs of experts


@functools.cache
def build() -> None:
    """Compile one small case, so that a machine where Triton cannot compile says so here."""
    if rerouting.phases.INTERPRETED:
        return
    device = torch.device("cuda", torch.cuda.current_device())
    ids = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    weights = torch.ones(1, 2, device=device)
    block = encode_rule("energy", loss=0.5).to(device)
    try:
        apply_(ids, weights, torch.ones(1, 2, device=device), block, 2)
        torch.cuda.synchronize(device)
    except Exception as error:
        raise BuildError(
            f"Triton {triton.__version__} does not compile the rules: {error}"
        ) from error


def apply(call: RuleCall, counters: torch.Tensor | None = None) -> Routed:
    """See `Implementation.apply`."""
    if call.rule == "similarity":
        return reference.apply(call, counters, reroute_impl="triton")
    return apply_copy(apply_, call, counters)


def apply_(
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
    """See `rules_device.ApplyInPlace`."""
    num_rows, top_k = ids.shape
    plan = plan_rule(num_rows, top_k, num_experts)
    experts, slots, rows = plan.experts, plan.slots, {"TILE": plan.tile}
    e_pad = experts["E_PAD"]
    # Weights are rounded after each operation, as in the other implementations.
    how = {"num_warps": plan.warps, "enable_fp_fusion": False}
    strides = (ids.stride(0), weights.stride(0))
    gone = lost or (None, None)
    active = None if active is None else active.view(torch.uint8)

    with rerouting.on_device(ids):
        make = torch.empty if plan.one_program else torch.zeros
        # Sums, totals, and behind them the flags.
        words = e_pad + TOTAL_SUMS + SCRATCH_ROWS * e_pad // 2
        sums = make(words, dtype=torch.int64, device=ids.device)
        flags = sums[e_pad + TOTAL_SUMS :].view(torch.int32)
        if plan.one_program:
            kernels.rule_decode[(1,)](
                ids, weights, scores, block, expert_loss, row_class, counters, active, *gone, flags,
                sums, num_rows, *strides, **experts, **slots, **rows, WIDE_TILE=plan.wide_tile,
                EXPERT_TILE=plan.expert_tile, **how,
            )  # fmt: skip
            return
        tiles = (triton.cdiv(num_rows, plan.tile),)
        wide_tiles = (triton.cdiv(num_rows, plan.wide_tile),)
        kernels.rule_vote_many[tiles](
            ids, weights, block, expert_loss, row_class, flags, sums, num_rows, *strides,
            **experts, **slots, **rows, **how,
        )  # fmt: skip
        if scores is not None:
            kernels.rule_add_scores_many[wide_tiles](
                scores, block, row_class, sums, num_rows, **experts, WIDE_TILE=plan.wide_tile, **how
            )
        kernels.rule_choose_many[(triton.cdiv(num_experts, plan.expert_tile),)](
            block, flags, sums, num_rows, **experts, EXPERT_TILE=plan.expert_tile, **how
        )
        kernels.rule_fill_many[wide_tiles](
            ids, weights, scores, block, expert_loss, row_class, *gone, flags, sums, num_rows,
            *strides, **experts, **slots, WIDE_TILE=plan.wide_tile, **how,
        )  # fmt: skip
        kernels.rule_finish_many[(1,)](
            ids, weights, block, counters, active, flags, sums, num_rows, *strides, **experts,
            **slots, **rows, **how,
        )  # fmt: skip


class Plan(NamedTuple):
    """How one size is launched; the kernels' compile-time sizes.

    tile: rows that `vote` looks at together. wide_tile: rows whose scores of all experts are.
    expert_tile: experts that `choose` decides on together.
    """

    one_program: bool
    experts: dict[str, int]
    slots: dict[str, int]
    tile: int
    wide_tile: int
    expert_tile: int
    warps: int


def plan_rule(num_rows: int, top_k: int, num_experts: int) -> Plan:
    """Of T, K and E."""
    e_pad = max(16, triton.next_power_of_2(num_experts))
    k_pad = triton.next_power_of_2(top_k)
    large = num_rows * k_pad > SMALL_TILE_SLOTS
    one_program = num_rows * e_pad <= ONE_PROGRAM_SCORES and e_pad <= ONE_PROGRAM_EXPERTS
    wide = one_program and num_rows * e_pad > SMALL_WIDE_TILE
    return Plan(
        one_program,
        {"E": num_experts, "E_PAD": e_pad},
        {"K": top_k, "K_PAD": k_pad},
        tile=max(1, (LARGE_TILE_SLOTS if large else SMALL_TILE_SLOTS) // k_pad),
        wide_tile=max(1, (WIDE_TILE if wide else SMALL_WIDE_TILE) // e_pad),
        expert_tile=max(1, min(e_pad, CHOOSE_TILE // e_pad)),
        warps=8 if large or wide else 4,
    )
