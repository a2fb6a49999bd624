"""Triton kernels of re-routing: vote, match, mark, apply and finish (triton/phases.py).

For decode sizes one program runs all of them, with barriers between; for more rows each phase is a
launch of its own over many programs.
"""

# mypy: disable-error-code="no-untyped-def"
# Parameters of kernels are Triton's pointers and tensors, which have no static types.

from __future__ import annotations

import triton
import triton.language as tl

from sere_sglang.ops.triton.phases import (
    AFTER,
    BEFORE,
    BEST_ID,
    PRIMARY,
    ROWS_AFTER_USABLE,
    TOTAL_CRITICAL,
    TOTAL_REROUTED,
    TOTALS,
    WANTED,
    apply,
    finish,
    is_active,
    list_active,
    mark,
    match,
    valid_rows,
    vote,
)


@triton.jit(do_not_specialize=["num_rows"])
def reroute_decode(
    ids, weights, similarity, scale, control, row_class, counters, scratch, num_rows,
    id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
    EXPERT_TILE: tl.constexpr, DISTINCT: tl.constexpr,
):  # fmt: skip
    """All of it in one program."""
    if is_active(control, K):
        num_valid = valid_rows(control, num_rows)
        column = tl.arange(0, E_PAD)
        zero = tl.zeros([E_PAD], tl.int32)
        tl.store(scratch + BEFORE * E_PAD + column, zero)
        tl.store(scratch + PRIMARY * E_PAD + column, zero)
        tl.store(scratch + AFTER * E_PAD + column, zero)
        tl.debug_barrier()
        for start in range(0, num_valid, TILE):
            vote(
                ids, weights, control, row_class, scratch, start, num_valid,
                id_stride, weight_stride, E, E_PAD, K, K_PAD, TILE,
            )  # fmt: skip
        tl.debug_barrier()

        # The experts to match become a dense list, so that the work follows their number, not E.
        primary = tl.load(scratch + PRIMARY * E_PAD + column)
        any_primary = tl.max(primary, axis=0)
        in_use = tl.load(scratch + BEFORE * E_PAD + column)
        wanted = in_use * (1 - primary) * any_primary
        place = tl.cumsum(wanted, axis=0) - 1
        tl.store(scratch + WANTED * E_PAD + place, column, mask=wanted != 0)
        tl.store(scratch + BEST_ID * E_PAD + column, column, mask=wanted == 0)
        num_wanted = tl.sum(wanted, axis=0)
        tl.debug_barrier()
        for start in range(0, num_wanted, EXPERT_TILE):
            index = start + tl.arange(0, EXPERT_TILE)
            expert = tl.load(scratch + WANTED * E_PAD + index, mask=index < num_wanted, other=0)
            match(similarity, scratch, expert, index < num_wanted, E, E_PAD)
        tl.debug_barrier()

        rerouted = num_valid * 0
        critical = num_valid * 0
        rows_after_usable = num_valid * 0
        for start in range(0, num_valid, TILE):
            moved, kept, rows = mark(
                ids, weights, control, row_class, scratch, start, num_rows, num_valid,
                id_stride, weight_stride, E, E_PAD, K, K_PAD, TILE,
            )  # fmt: skip
            rerouted += moved
            critical += kept
            rows_after_usable = tl.maximum(rows_after_usable, rows)
        tl.debug_barrier()
        num_active = list_active(scratch, E_PAD)
        tl.debug_barrier()
        for start in range(0, num_valid, TILE):
            apply(
                ids, weights, scale, control, row_class, scratch, num_active, start, num_valid,
                id_stride, weight_stride, E, E_PAD, K, K_PAD, TILE, DISTINCT,
            )  # fmt: skip
        tl.debug_barrier()
        finish(
            ids, counters, scratch, rerouted, critical, rows_after_usable, num_rows, num_valid,
            id_stride, E_PAD, K, K_PAD, TILE, DISTINCT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def vote_many(
    ids, weights, control, row_class, scratch, num_rows, id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of rows per program, into a zeroed scratch."""
    if is_active(control, K):
        vote(
            ids, weights, control, row_class, scratch, tl.program_id(0) * TILE,
            valid_rows(control, num_rows), id_stride, weight_stride, E, E_PAD, K, K_PAD, TILE,
        )  # fmt: skip


@triton.jit
def match_many(
    similarity, control, scratch,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, EXPERT_TILE: tl.constexpr,
):  # fmt: skip
    """A few experts per program."""
    if is_active(control, K):
        column = tl.arange(0, E_PAD)
        any_primary = tl.max(tl.load(scratch + PRIMARY * E_PAD + column), axis=0)
        expert = tl.program_id(0) * EXPERT_TILE + tl.arange(0, EXPERT_TILE)
        mask = expert < E
        in_use = tl.load(scratch + BEFORE * E_PAD + expert, mask=mask, other=0)
        primary = tl.load(scratch + PRIMARY * E_PAD + expert, mask=mask, other=0)
        wanted = in_use * (1 - primary) * any_primary
        tl.store(scratch + BEST_ID * E_PAD + expert, expert, mask=mask & (wanted == 0))
        match(similarity, scratch, expert, wanted != 0, E, E_PAD)


@triton.jit(do_not_specialize=["num_rows"])
def mark_many(
    ids, weights, control, row_class, scratch, num_rows, id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of rows per program."""
    if is_active(control, K):
        rerouted, critical, rows_after_usable = mark(
            ids, weights, control, row_class, scratch, tl.program_id(0) * TILE, num_rows,
            valid_rows(control, num_rows), id_stride, weight_stride, E, E_PAD, K, K_PAD, TILE,
        )  # fmt: skip
        totals = scratch + TOTALS * E_PAD
        tl.atomic_max(totals + ROWS_AFTER_USABLE, rows_after_usable, sem="relaxed")
        tl.atomic_add(totals + TOTAL_REROUTED, rerouted, sem="relaxed")
        tl.atomic_add(totals + TOTAL_CRITICAL, critical, sem="relaxed")


@triton.jit(do_not_specialize=["num_rows"])
def apply_many(
    ids, weights, scale, control, row_class, scratch, num_rows, id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
    DISTINCT: tl.constexpr,
):  # fmt: skip
    """One tile of rows per program; each lists A for itself, all write the same."""
    if is_active(control, K):
        num_active = list_active(scratch, E_PAD)
        tl.debug_barrier()
        apply(
            ids, weights, scale, control, row_class, scratch, num_active, tl.program_id(0) * TILE,
            valid_rows(control, num_rows), id_stride, weight_stride, E, E_PAD, K, K_PAD, TILE,
            DISTINCT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def finish_many(
    ids, counters, control, scratch, num_rows, id_stride,
    E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
    DISTINCT: tl.constexpr,
):  # fmt: skip
    """One program."""
    if is_active(control, K):
        totals = scratch + TOTALS * E_PAD
        finish(
            ids, counters, scratch, tl.load(totals + TOTAL_REROUTED),
            tl.load(totals + TOTAL_CRITICAL), tl.load(totals + ROWS_AFTER_USABLE), num_rows,
            valid_rows(control, num_rows), id_stride, E_PAD, K, K_PAD, TILE, DISTINCT,
        )  # fmt: skip
