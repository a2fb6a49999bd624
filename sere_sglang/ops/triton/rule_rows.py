"""What a row holds of A under a rule, in which slot and with which weight, in Triton.

As csrc/rules_core.h and reference/rules.py, for a tile of rows at once. Weights are added slot
after slot and rounded as there: launch with ``enable_fp_fusion=False``.
"""

# mypy: disable-error-code="no-untyped-def"
# Parameters of kernels are Triton's pointers and tensors, which have no static types.

from __future__ import annotations

import triton
import triton.language as tl

from sere_sglang.ops.triton.phases import AFTER, keep_distinct
from sere_sglang.ops.triton.rule_phases import (
    BUDGET,
    ENERGY,
    FILL_WEIGHT,
    GAMMA,
    HELD,
    LOADED,
    LOST,
    PIGGYBACK,
    TOPK,
    TRUNCATE,
    has_flag,
    load_rule_rows,
    lost_energy,
    rule_of,
)


@triton.jit
def sum_slots(slot, value, where, K: tl.constexpr, TILE: tl.constexpr):
    """[TILE], of the slots `where`, one after the other."""
    total = tl.zeros([TILE], tl.float32)
    value = tl.where(where, value, 0.0)
    for k in range(K):
        total += tl.sum(tl.where((slot == k)[None, :], value, 0.0), axis=1)  # of one slot: exact
    return total


@triton.jit
def ratio(above, below, otherwise):
    empty = below == 0.0
    return tl.where(empty, otherwise, tl.div_rn(above, tl.where(empty, 1.0, below)))


@triton.jit
def next_best(
    scores, flags, row, slot, own, held, wanted,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """For the `wanted` slots, in slot order, the row's best of A by score that it does not hold.

    Returns ids, scores, and which of the slots got one (A may be too small).
    """
    column = tl.arange(0, E_PAD)
    member = tl.load(flags + AFTER * E_PAD + column) != 0
    number = tl.sum(wanted.to(tl.int32), axis=1)
    among = (number > 0)[:, None] & member[None, :]
    left = tl.load(scores + row[:, None] * E + column[None, :], mask=among, other=-1.0)
    for k in range(K):
        here = (slot == k)[None, :] & held
        expert = tl.sum(tl.where(here, own + 1, 0), axis=1) - 1
        left = tl.where(column[None, :] == expert[:, None], -1.0, left)
    turn = tl.cumsum(wanted.to(tl.int32), axis=1) - 1
    best = tl.zeros([TILE, K_PAD], tl.int32)
    best_score = tl.zeros([TILE, K_PAD], tl.float32)
    found = wanted & (wanted == 0)
    for i in range(0, tl.max(number, axis=0)):
        top = tl.max(left, axis=1)
        expert = tl.min(tl.where(left == top[:, None], column[None, :], E_PAD), axis=1)
        mine = wanted & (turn == i) & (top >= 0.0)[:, None]
        best = tl.where(mine, expert[:, None], best)
        best_score = tl.where(mine, top[:, None], best_score)
        found = found | mine
        left = tl.where(column[None, :] == expert[:, None], -1.0, left)
    return best, best_score, found


@triton.jit
def fill(
    ids, weights, scores, block, expert_loss, row_class, lost, lost_experts, flags, num_active,
    start, num_valid, id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Returns how many slots moved, and the squared weight that was lost, in fixed point."""
    row, slot, _, own, old, routed, sure, protected, fast = load_rule_rows(
        ids, weights, block, row_class, start, num_valid, id_stride, weight_stride,
        E, K, K_PAD, TILE,
    )  # fmt: skip
    rule = rule_of(block)
    live = routed & (protected == 0)[:, None] & (num_active > 0)
    own_in = live & (tl.load(flags + AFTER * E_PAD + own, mask=live, other=0) != 0)
    mass = sum_slots(slot, old, live, K, TILE)
    # Which rows hold their own experts only, those in A, and with which of them the others start.
    reorders = (rule == PIGGYBACK) | ((rule == BUDGET) & (has_flag(block, TRUNCATE) == 0))
    a = tl.load(block + FILL_WEIGHT).to(tl.float32, bitcast=True)
    tops_up = (rule == ENERGY) & (a > 0.0)
    kept = tl.where(rule == TOPK, live & sure, own_in & (reorders == 0))
    new = own
    weight = old
    taken = kept
    if scores is not None:  # noqa: SIM102 - no code for the inner one without
        if reorders | tops_up:
            wanted = live & (kept == 0)
            best, best_score, found = next_best(
                scores, flags, row, slot, own, kept, wanted, E, E_PAD, K, K_PAD, TILE
            )
            factor = ratio(mass, sum_slots(slot, best_score, found, K, TILE), 0.0)
            best_weight = best_score * factor[:, None]
            if tops_up:
                at = scores + row[:, None] * E + own
                own_score = tl.load(at, mask=live, other=0.0)
                unit = ratio(mass, sum_slots(slot, own_score, live, K, TILE), 0.0)
                best_weight = best_score * unit[:, None] * a
            new = tl.where(found, best, new)
            weight = tl.where(found, best_weight, weight)
            taken = taken | found

    # Times (original mass / new mass)^exponent, in rows that lost a slot.
    gamma = tl.load(block + GAMMA).to(tl.float32, bitcast=True)
    exponent = tl.where(rule == ENERGY, gamma, 1.0)
    if (reorders == 0) & (exponent != 0.0):
        factor = ratio(mass, sum_slots(slot, weight, taken, K, TILE), 1.0)
        power = tl.exp2(exponent * tl.log2(tl.maximum(factor, 0.0)))
        factor = tl.where(exponent == 1.0, factor, power)
        lossless = tl.max((live & (kept == 0)).to(tl.int32), axis=1) == 0
        weight = weight * tl.where(lossless, 1.0, factor)[:, None]

    freed = live & (taken == 0)
    if tl.max(tl.max(freed.to(tl.int32), axis=1), axis=0) > 0:
        new = keep_distinct(flags, num_active, own, new, live, freed, E_PAD)
    weight = tl.where(live, tl.where(freed, 0.0, weight), old)
    # Every thread has read the tile before any thread writes to it.
    tl.debug_barrier()
    tl.store(ids + row[:, None] * id_stride + slot[None, :], new, mask=live)
    tl.store(weights + row[:, None] * weight_stride + slot[None, :], weight, mask=live)

    one = tl.full([TILE, K_PAD], 1, tl.int32)
    tl.store(flags + HELD * E_PAD + new, one, mask=routed)
    tl.store(flags + LOADED * E_PAD + new, one, mask=routed & (weight != 0.0))
    gone = live & (own_in == 0)
    if lost is not None:
        mask = gone & has_flag(block, LOST)
        tl.store(lost + row[:, None] * K + slot[None, :], old, mask=mask)
        tl.store(lost_experts + row[:, None] * K + slot[None, :], own, mask=mask)
    spoke = gone & (fast == 0)[:, None]
    squares = tl.where(spoke, lost_energy(block, expert_loss, own, old, spoke), 0)
    moved = (routed & (new != own)).to(tl.int64)
    return tl.sum(tl.sum(moved, axis=1), axis=0), tl.sum(tl.sum(squares, axis=1), axis=0)
