"""Triton kernels of the rules beside ``similarity``: vote, choose, fill, finish.

For few rows and experts one program runs all of them, with barriers between; else each phase is a
launch of its own over many programs (triton/rule_phases.py, triton/rule_rows.py).
"""

# mypy: disable-error-code="no-untyped-def"
# Parameters of kernels are Triton's pointers and tensors, which have no static types.

from __future__ import annotations

import triton
import triton.language as tl

from sere_sglang.ops.triton.phases import BEFORE, PRIMARY, list_active
from sere_sglang.ops.triton.rule_phases import (
    BUDGET,
    HELD,
    LOADED,
    SUM_LOST,
    SUM_MOVED,
    SUM_USABLE,
    add_scores,
    choose,
    finish,
    rule_of,
    rule_rows,
    vote,
)
from sere_sglang.ops.triton.rule_rows import fill


@triton.jit(do_not_specialize=["num_rows"])
def rule_decode(
    ids, weights, scores, block, expert_loss, row_class, counters, active, lost, lost_experts,
    flags, sums, num_rows, id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
    WIDE_TILE: tl.constexpr, EXPERT_TILE: tl.constexpr,
):  # fmt: skip
    """All of it in one program."""
    rule = rule_of(block)
    if rule != 0:
        num_valid = rule_rows(block, num_rows)
        column = tl.arange(0, E_PAD)
        zero = tl.zeros([E_PAD], tl.int32)
        tl.store(flags + BEFORE * E_PAD + column, zero)
        tl.store(flags + PRIMARY * E_PAD + column, zero)
        tl.store(flags + HELD * E_PAD + column, zero)
        tl.store(flags + LOADED * E_PAD + column, zero)
        tl.store(sums + column, tl.zeros([E_PAD], tl.int64))
        tl.debug_barrier()
        rows_after_usable = num_valid * 0
        for start in range(0, num_valid, TILE):
            rows = vote(
                ids, weights, block, expert_loss, row_class, flags, sums, start, num_rows,
                num_valid, id_stride, weight_stride, E, E_PAD, K, K_PAD, TILE,
            )  # fmt: skip
            rows_after_usable = tl.maximum(rows_after_usable, rows)
        if scores is not None:  # noqa: SIM102 - no code for the inner one without
            if rule == BUDGET:
                for start in range(0, num_valid, WIDE_TILE):
                    add_scores(
                        scores, block, row_class, sums, start, num_valid, E, E_PAD, WIDE_TILE
                    )
        tl.debug_barrier()
        for start in range(0, E_PAD, EXPERT_TILE):
            expert = start + tl.arange(0, EXPERT_TILE)
            choose(block, flags, sums, expert, num_valid, E, E_PAD)
        tl.debug_barrier()
        num_active = list_active(flags, E_PAD)
        tl.debug_barrier()
        moved = num_valid.to(tl.int64) * 0
        squares = num_valid.to(tl.int64) * 0
        for start in range(0, num_valid, WIDE_TILE):
            own_moved, own_squares = fill(
                ids, weights, scores, block, expert_loss, row_class, lost, lost_experts, flags,
                num_active, start, num_valid, id_stride, weight_stride,
                E, E_PAD, K, K_PAD, WIDE_TILE,
            )  # fmt: skip
            moved += own_moved
            squares += own_squares
        tl.debug_barrier()
        finish(
            ids, weights, counters, active, flags, num_active, moved, squares,
            rows_after_usable, num_rows, num_valid, id_stride, weight_stride,
            E, E_PAD, K, K_PAD, TILE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def rule_vote_many(
    ids, weights, block, expert_loss, row_class, flags, sums, num_rows, id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of rows per program, into a zeroed scratch."""
    if rule_of(block) != 0:
        rows_after_usable = vote(
            ids, weights, block, expert_loss, row_class, flags, sums, tl.program_id(0) * TILE,
            num_rows, rule_rows(block, num_rows), id_stride, weight_stride,
            E, E_PAD, K, K_PAD, TILE,
        )  # fmt: skip
        usable = rows_after_usable.to(tl.int64)
        tl.atomic_max(sums + E_PAD + SUM_USABLE, usable, sem="relaxed")


@triton.jit(do_not_specialize=["num_rows"])
def rule_add_scores_many(
    scores, block, row_class, sums, num_rows,
    E: tl.constexpr, E_PAD: tl.constexpr, WIDE_TILE: tl.constexpr,
):  # fmt: skip
    """One tile of rows per program."""
    if rule_of(block) == BUDGET:
        add_scores(
            scores, block, row_class, sums, tl.program_id(0) * WIDE_TILE,
            rule_rows(block, num_rows), E, E_PAD, WIDE_TILE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def rule_choose_many(
    block, flags, sums, num_rows,
    E: tl.constexpr, E_PAD: tl.constexpr, EXPERT_TILE: tl.constexpr,
):  # fmt: skip
    """A few experts per program."""
    if rule_of(block) != 0:
        expert = tl.program_id(0) * EXPERT_TILE + tl.arange(0, EXPERT_TILE)
        choose(block, flags, sums, expert, rule_rows(block, num_rows), E, E_PAD)


@triton.jit(do_not_specialize=["num_rows"])
def rule_fill_many(
    ids, weights, scores, block, expert_loss, row_class, lost, lost_experts, flags, sums, num_rows,
    id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    WIDE_TILE: tl.constexpr,
):  # fmt: skip
    """One tile of rows per program; each lists A for itself, all write the same."""
    if rule_of(block) != 0:
        num_active = list_active(flags, E_PAD)
        tl.debug_barrier()
        moved, squares = fill(
            ids, weights, scores, block, expert_loss, row_class, lost, lost_experts, flags,
            num_active, tl.program_id(0) * WIDE_TILE, rule_rows(block, num_rows), id_stride,
            weight_stride, E, E_PAD, K, K_PAD, WIDE_TILE,
        )  # fmt: skip
        tl.atomic_add(sums + E_PAD + SUM_MOVED, moved, sem="relaxed")
        tl.atomic_add(sums + E_PAD + SUM_LOST, squares, sem="relaxed")


@triton.jit(do_not_specialize=["num_rows"])
def rule_finish_many(
    ids, weights, block, counters, active, flags, sums, num_rows, id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program."""
    if rule_of(block) != 0:
        num_active = list_active(flags, E_PAD)
        tl.debug_barrier()
        totals = sums + E_PAD
        finish(
            ids, weights, counters, active, flags, num_active, tl.load(totals + SUM_MOVED),
            tl.load(totals + SUM_LOST), tl.load(totals + SUM_USABLE).to(tl.int32), num_rows,
            rule_rows(block, num_rows), id_stride, weight_stride, E, E_PAD, K, K_PAD, TILE,
        )  # fmt: skip
