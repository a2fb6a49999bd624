"""Triton kernels of re-routing, in four phases that share a scratch row in device memory.

vote    rows -> which experts are in use, which are primary
match   experts in use outside P -> their best primary
apply   rows -> new ids, scaled weights
finish  padding rows, counters

For decode sizes one program runs all four, with barriers between; for more rows each phase is a
launch of its own over many programs. Phases write flags and results per expert to the scratch row,
never counts: who writes a flag first does not matter, so no atomics are needed there.
"""

# mypy: disable-error-code="no-untyped-def"
# Parameters of kernels are Triton's pointers and tensors, which have no static types.

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels below run in Triton's interpreter; Triton decides when it sees them."""

MAX_CLASSES = tl.constexpr(4)
ENABLED = tl.constexpr(0)  # words of the control block, see control.py
NUM_VALID = tl.constexpr(1)
NUM_CLASSES = tl.constexpr(2)
PRIMARY_K = tl.constexpr(4)
THRESHOLD = tl.constexpr(8)

# Rows of the scratch, E_PAD words each: flags, flags, flags, ids, float bits, a list of ids, and
# three words that only the many-program form uses.
BEFORE = tl.constexpr(0)
PRIMARY = tl.constexpr(1)
AFTER = tl.constexpr(2)
BEST_ID = tl.constexpr(3)
BEST = tl.constexpr(4)
WANTED = tl.constexpr(5)
TOTALS = tl.constexpr(6)
SCRATCH_ROWS = 7
TOTAL_REROUTED = tl.constexpr(0)
TOTAL_CRITICAL = tl.constexpr(1)
ROWS_AFTER_USABLE = tl.constexpr(2)  # T - (first row that padding can copy); 0: there is none


@triton.jit
def _is_active(control, K: tl.constexpr):
    """Whether this forward may change anything at all."""
    num_classes = tl.minimum(tl.maximum(tl.load(control + NUM_CLASSES), 1), MAX_CLASSES)
    index = tl.arange(0, MAX_CLASSES)
    primary_k = tl.load(control + PRIMARY_K + index)
    some_class_moves = tl.sum(((index < num_classes) & (primary_k < K)).to(tl.int32), axis=0) > 0
    only_class_is_off = (num_classes == 1) & (tl.load(control + PRIMARY_K) <= 0)
    return (tl.load(control + ENABLED) != 0) & some_class_moves & (only_class_is_off == 0)


@triton.jit
def _valid_rows(control, num_rows):
    num_valid = tl.load(control + NUM_VALID)
    return tl.where((num_valid < 0) | (num_valid > num_rows), num_rows, num_valid)


@triton.jit
def _load_rows(
    ids, weights, control, row_class, start, num_valid, id_stride, weight_stride,
    E: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of valid rows: ids, weights, which slots hold an expert, which are primary, rho."""
    row = start + tl.arange(0, TILE)
    slot = tl.arange(0, K_PAD)
    inside = (row < num_valid)[:, None] & (slot < K)[None, :]
    expert = tl.load(ids + row[:, None] * id_stride + slot[None, :], mask=inside, other=-1)
    routed = inside & (expert >= 0) & (expert < E)

    if row_class is None:
        index = tl.zeros([TILE], tl.int32)
    else:
        num_classes = tl.minimum(tl.maximum(tl.load(control + NUM_CLASSES), 1), MAX_CLASSES)
        index = tl.load(row_class + row, mask=row < num_valid, other=0).to(tl.int32)
        index = tl.minimum(index, num_classes - 1)
    primary_k = tl.maximum(tl.load(control + PRIMARY_K + index), 1)
    rho = tl.load(control + THRESHOLD + index).to(tl.float32, bitcast=True)

    if weights is None:
        weight = tl.zeros([TILE, K_PAD], tl.float32)
        rank = slot[None, :] + tl.zeros([TILE, K_PAD], tl.int32)
    else:
        weight = tl.load(
            weights + row[:, None] * weight_stride + slot[None, :],
            mask=inside,
            other=float("-inf"),
        )
        mine = weight[:, :, None]
        other = weight[:, None, :]
        earlier = (slot[None, :] < slot[:, None])[None, :, :]
        rank = tl.sum(((other > mine) | ((other == mine) & earlier)).to(tl.int32), axis=2)
    return row, slot, inside, expert, weight, routed, rank < primary_k[:, None], rho


@triton.jit
def _vote(
    ids, weights, control, row_class, scratch, start, num_valid, id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    _, _, _, expert, _, routed, primary, _ = _load_rows(
        ids, weights, control, row_class, start, num_valid, id_stride, weight_stride,
        E, K, K_PAD, TILE,
    )  # fmt: skip
    one = tl.full([TILE, K_PAD], 1, tl.int32)
    tl.store(scratch + BEFORE * E_PAD + expert, one, mask=routed)
    tl.store(scratch + PRIMARY * E_PAD + expert, one, mask=routed & primary)


@triton.jit
def _match(similarity, scratch, expert, wanted, E: tl.constexpr, E_PAD: tl.constexpr):
    """For the wanted ones of a few experts, the highest similarity in P, the lowest id on a tie."""
    column = tl.arange(0, E_PAD)
    primary = tl.load(scratch + PRIMARY * E_PAD + column) != 0
    among = wanted[:, None] & primary[None, :]
    row = tl.load(
        similarity + expert[:, None] * E + column[None, :], mask=among, other=float("-inf")
    )
    best = tl.max(row, axis=1)
    holder = among & (row == best[:, None])
    best_id = tl.min(tl.where(holder, column[None, :], E_PAD), axis=1)
    tl.store(scratch + BEST * E_PAD + expert, best.to(tl.int32, bitcast=True), mask=wanted)
    tl.store(scratch + BEST_ID * E_PAD + expert, best_id, mask=wanted)


@triton.jit
def _apply(
    ids, weights, scale, control, row_class, scratch, start, num_rows, num_valid,
    id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Returns moved slots, critical slots, rows from the first whole one on (0: no whole row)."""
    row, slot, inside, expert, weight, routed, primary, rho = _load_rows(
        ids, weights, control, row_class, start, num_valid, id_stride, weight_stride,
        E, K, K_PAD, TILE,
    )  # fmt: skip
    secondary = routed & (primary == 0)
    # An expert that stays in any case (in P, or P is empty) is listed as its own best.
    best_id = tl.load(scratch + BEST_ID * E_PAD + expert, mask=secondary, other=-1)
    candidate = secondary & (best_id != expert)
    best = tl.load(scratch + BEST * E_PAD + expert, mask=candidate, other=0)
    best = best.to(tl.float32, bitcast=True)
    critical = candidate & (rho > 0)[:, None] & (best < rho[:, None])
    moves = candidate & (critical == 0)
    new = tl.where(moves, best_id, expert)
    # Every thread has read the tile before any thread writes to it.
    tl.debug_barrier()
    tl.store(ids + row[:, None] * id_stride + slot[None, :], new, mask=moves)
    if scale is not None:
        factor = tl.load(scale + expert * E + best_id, mask=moves, other=1.0)
        tl.store(
            weights + row[:, None] * weight_stride + slot[None, :], weight * factor, mask=moves
        )
    if COUNT:
        one = tl.full([TILE, K_PAD], 1, tl.int32)
        tl.store(scratch + AFTER * E_PAD + new, one, mask=routed)
    holes = tl.sum((inside & (expert < 0)).to(tl.int32), axis=1)
    whole = (row < num_valid) & (holes == 0)
    rows_after_usable = tl.max(tl.where(whole, num_rows - row, 0), axis=0)
    rerouted = tl.sum(tl.sum(moves.to(tl.int32), axis=1), axis=0)
    num_critical = tl.sum(tl.sum(critical.to(tl.int32), axis=1), axis=0)
    return rerouted, num_critical, rows_after_usable


@triton.jit
def _finish(
    ids, counters, scratch, rerouted, critical, rows_after_usable, num_rows, num_valid, id_stride,
    E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, E_PAD)
    slot = tl.arange(0, K_PAD)
    primary = tl.load(scratch + PRIMARY * E_PAD + expert) != 0
    lowest = tl.min(tl.where(primary, expert, E_PAD), axis=0)
    if (num_valid < num_rows) & (lowest < E_PAD):
        usable_row = num_rows - rows_after_usable
        pad = tl.load(
            ids + usable_row * id_stride + slot, mask=(slot < K) & (rows_after_usable > 0), other=0
        )
        pad = tl.where(rows_after_usable > 0, pad, lowest)
        for start in range(num_valid, num_rows, TILE):
            row = start + tl.arange(0, TILE)
            tl.store(
                ids + row[:, None] * id_stride + slot[None, :],
                pad[None, :] + tl.zeros([TILE, K_PAD], tl.int32),
                mask=(row < num_rows)[:, None] & (slot < K)[None, :],
            )
    if counters is not None:
        before = tl.sum((tl.load(scratch + BEFORE * E_PAD + expert) != 0).to(tl.int32), axis=0)
        after = tl.sum((tl.load(scratch + AFTER * E_PAD + expert) != 0).to(tl.int32), axis=0)
        field = tl.arange(0, 8)  # counters.COUNTER_FIELDS
        step = tl.where(field == 0, (num_valid > 0).to(tl.int32), 0)
        step = tl.where(field == 1, num_valid, step)
        step = tl.where(field == 2, before, step)
        step = tl.where(field == 3, after, step)
        step = tl.where(field == 4, rerouted, step)
        step = tl.where(field == 5, critical, step)
        total = tl.load(counters + field, mask=field < 6, other=0) + step.to(tl.int64)
        tl.store(counters + field, total, mask=field < 6)


@triton.jit(do_not_specialize=["num_rows"])
def reroute_decode(
    ids, weights, similarity, scale, control, row_class, counters, scratch, num_rows,
    id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
    EXPERT_TILE: tl.constexpr,
):  # fmt: skip
    """All of it in one program."""
    if _is_active(control, K):
        num_valid = _valid_rows(control, num_rows)
        column = tl.arange(0, E_PAD)
        zero = tl.zeros([E_PAD], tl.int32)
        tl.store(scratch + BEFORE * E_PAD + column, zero)
        tl.store(scratch + PRIMARY * E_PAD + column, zero)
        tl.store(scratch + AFTER * E_PAD + column, zero)
        tl.debug_barrier()
        for start in range(0, num_valid, TILE):
            _vote(
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
            _match(similarity, scratch, expert, index < num_wanted, E, E_PAD)
        tl.debug_barrier()

        rerouted = num_valid * 0
        critical = num_valid * 0
        rows_after_usable = num_valid * 0
        for start in range(0, num_valid, TILE):
            moved, kept, rows = _apply(
                ids, weights, scale, control, row_class, scratch, start, num_rows, num_valid,
                id_stride, weight_stride, E, E_PAD, K, K_PAD, TILE, counters is not None,
            )  # fmt: skip
            rerouted += moved
            critical += kept
            rows_after_usable = tl.maximum(rows_after_usable, rows)
        tl.debug_barrier()
        _finish(
            ids, counters, scratch, rerouted, critical, rows_after_usable, num_rows, num_valid,
            id_stride, E_PAD, K, K_PAD, TILE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def vote_many(
    ids, weights, control, row_class, scratch, num_rows, id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of rows per program, into a zeroed scratch."""
    if _is_active(control, K):
        _vote(
            ids, weights, control, row_class, scratch, tl.program_id(0) * TILE,
            _valid_rows(control, num_rows), id_stride, weight_stride, E, E_PAD, K, K_PAD, TILE,
        )  # fmt: skip


@triton.jit
def match_many(
    similarity, control, scratch,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, EXPERT_TILE: tl.constexpr,
):  # fmt: skip
    """A few experts per program."""
    if _is_active(control, K):
        column = tl.arange(0, E_PAD)
        any_primary = tl.max(tl.load(scratch + PRIMARY * E_PAD + column), axis=0)
        expert = tl.program_id(0) * EXPERT_TILE + tl.arange(0, EXPERT_TILE)
        mask = expert < E
        in_use = tl.load(scratch + BEFORE * E_PAD + expert, mask=mask, other=0)
        primary = tl.load(scratch + PRIMARY * E_PAD + expert, mask=mask, other=0)
        wanted = in_use * (1 - primary) * any_primary
        tl.store(scratch + BEST_ID * E_PAD + expert, expert, mask=mask & (wanted == 0))
        _match(similarity, scratch, expert, wanted != 0, E, E_PAD)


@triton.jit(do_not_specialize=["num_rows"])
def apply_many(
    ids, weights, scale, control, row_class, scratch, num_rows, id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """One tile of rows per program."""
    if _is_active(control, K):
        rerouted, critical, rows_after_usable = _apply(
            ids, weights, scale, control, row_class, scratch, tl.program_id(0) * TILE, num_rows,
            _valid_rows(control, num_rows), id_stride, weight_stride,
            E, E_PAD, K, K_PAD, TILE, COUNT,
        )  # fmt: skip
        totals = scratch + TOTALS * E_PAD
        tl.atomic_max(totals + ROWS_AFTER_USABLE, rows_after_usable, sem="relaxed")
        if COUNT:
            tl.atomic_add(totals + TOTAL_REROUTED, rerouted, sem="relaxed")
            tl.atomic_add(totals + TOTAL_CRITICAL, critical, sem="relaxed")


@triton.jit(do_not_specialize=["num_rows"])
def finish_many(
    ids, counters, control, scratch, num_rows, id_stride,
    E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program."""
    if _is_active(control, K):
        totals = scratch + TOTALS * E_PAD
        _finish(
            ids, counters, scratch, tl.load(totals + TOTAL_REROUTED),
            tl.load(totals + TOTAL_CRITICAL), tl.load(totals + ROWS_AFTER_USABLE), num_rows,
            _valid_rows(control, num_rows), id_stride, E_PAD, K, K_PAD, TILE,
        )  # fmt: skip
