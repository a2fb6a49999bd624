"""The phases of re-routing in Triton, for the kernels in triton/kernels.py to call.

vote    rows -> which experts are in use, which are primary
match   experts in use outside P -> their best primary
mark    rows -> which experts are active afterwards, counts
apply   rows -> new ids and weights
finish  padding rows, counters

They share a scratch row in device memory, to which they write flags and results per expert, never
counts: who writes a flag first does not matter, so no atomics are needed there.
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

# Rows of the scratch, E_PAD words each: flags, flags, flags, ids, float bits, a list of ids, those
# that are active, their places in it, and three words that only the many-program form uses.
BEFORE = tl.constexpr(0)
PRIMARY = tl.constexpr(1)
AFTER = tl.constexpr(2)
BEST_ID = tl.constexpr(3)
BEST = tl.constexpr(4)
WANTED = tl.constexpr(5)
LISTED = tl.constexpr(6)
PLACE = tl.constexpr(7)
TOTALS = tl.constexpr(8)
SCRATCH_ROWS = 9
TOTAL_REROUTED = tl.constexpr(0)
TOTAL_CRITICAL = tl.constexpr(1)
ROWS_AFTER_USABLE = tl.constexpr(2)  # T - (first row that padding can copy); 0: there is none


@triton.jit
def is_active(control, K: tl.constexpr):
    """Whether this forward may change anything at all."""
    num_classes = tl.minimum(tl.maximum(tl.load(control + NUM_CLASSES), 1), MAX_CLASSES)
    index = tl.arange(0, MAX_CLASSES)
    primary_k = tl.load(control + PRIMARY_K + index)
    some_class_moves = tl.sum(((index < num_classes) & (primary_k < K)).to(tl.int32), axis=0) > 0
    only_class_is_off = (num_classes == 1) & (tl.load(control + PRIMARY_K) <= 0)
    return (tl.load(control + ENABLED) != 0) & some_class_moves & (only_class_is_off == 0)


@triton.jit
def valid_rows(control, num_rows):
    num_valid = tl.load(control + NUM_VALID)
    return tl.where((num_valid < 0) | (num_valid > num_rows), num_rows, num_valid)


@triton.jit
def rank_slots(slot, weight):
    """Of each slot in its row: weight descending, ties by slot order."""
    mine = weight[:, :, None]
    other = weight[:, None, :]
    earlier = (slot[None, :] < slot[:, None])[None, :, :]
    return tl.sum(((other > mine) | ((other == mine) & earlier)).to(tl.int32), axis=2)


@triton.jit
def load_slots(
    ids, start, num_valid, id_stride,
    E: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of valid rows: ids, and which slots hold an expert."""
    row = start + tl.arange(0, TILE)
    slot = tl.arange(0, K_PAD)
    inside = (row < num_valid)[:, None] & (slot < K)[None, :]
    expert = tl.load(ids + row[:, None] * id_stride + slot[None, :], mask=inside, other=-1)
    return row, slot, inside, expert, inside & (expert >= 0) & (expert < E)


@triton.jit
def load_rows(
    ids, weights, control, row_class, start, num_valid, id_stride, weight_stride,
    E: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of valid rows: ids, weights, which slots hold an expert, which are primary, rho."""
    row, slot, inside, expert, routed = load_slots(
        ids, start, num_valid, id_stride, E, K, K_PAD, TILE
    )

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
        rank = rank_slots(slot, weight)
    return row, slot, inside, expert, weight, routed, rank < primary_k[:, None], rho


@triton.jit
def vote(
    ids, weights, control, row_class, scratch, start, num_valid, id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    _, _, _, expert, _, routed, primary, _ = load_rows(
        ids, weights, control, row_class, start, num_valid, id_stride, weight_stride,
        E, K, K_PAD, TILE,
    )  # fmt: skip
    one = tl.full([TILE, K_PAD], 1, tl.int32)
    tl.store(scratch + BEFORE * E_PAD + expert, one, mask=routed)
    tl.store(scratch + PRIMARY * E_PAD + expert, one, mask=routed & primary)


@triton.jit
def match(similarity, scratch, expert, wanted, E: tl.constexpr, E_PAD: tl.constexpr):
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
def resolve(scratch, expert, routed, primary, rho, E_PAD: tl.constexpr):
    """Of a tile: what each slot becomes, and which slots move, which are critical."""
    secondary = routed & (primary == 0)
    # An expert that stays in any case (in P, or P is empty) is listed as its own best.
    best_id = tl.load(scratch + BEST_ID * E_PAD + expert, mask=secondary, other=-1)
    candidate = secondary & (best_id != expert)
    best = tl.load(scratch + BEST * E_PAD + expert, mask=candidate, other=0)
    best = best.to(tl.float32, bitcast=True)
    critical = candidate & (rho > 0)[:, None] & (best < rho[:, None])
    moves = candidate & (critical == 0)
    return tl.where(moves, best_id, expert), moves, critical


@triton.jit
def mark(
    ids, weights, control, row_class, scratch, start, num_rows, num_valid, id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Returns moved slots, critical slots, rows from the first whole one on (0: no whole row)."""
    row, _, inside, expert, _, routed, primary, rho = load_rows(
        ids, weights, control, row_class, start, num_valid, id_stride, weight_stride,
        E, K, K_PAD, TILE,
    )  # fmt: skip
    new, moves, critical = resolve(scratch, expert, routed, primary, rho, E_PAD)
    one = tl.full([TILE, K_PAD], 1, tl.int32)
    tl.store(scratch + AFTER * E_PAD + new, one, mask=routed)
    holes = tl.sum((inside & (expert < 0)).to(tl.int32), axis=1)
    whole = (row < num_valid) & (holes == 0)
    rows_after_usable = tl.max(tl.where(whole, num_rows - row, 0), axis=0)
    rerouted = tl.sum(tl.sum(moves.to(tl.int32), axis=1), axis=0)
    num_critical = tl.sum(tl.sum(critical.to(tl.int32), axis=1), axis=0)
    return rerouted, num_critical, rows_after_usable


@triton.jit
def list_active(scratch, E_PAD: tl.constexpr):
    """A as a list, lowest first, and the place of each in it. Returns their number."""
    column = tl.arange(0, E_PAD)
    active = tl.load(scratch + AFTER * E_PAD + column)
    place = tl.cumsum(active, axis=0) - 1
    tl.store(scratch + LISTED * E_PAD + place, column, mask=active != 0)
    tl.store(scratch + PLACE * E_PAD + column, place, mask=active != 0)
    return tl.sum(active, axis=0)


@triton.jit
def sum_met(
    slot, new, weight, routed, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """For each slot the weights of all that hold its expert, added in slot order."""
    total = tl.zeros([TILE, K_PAD], tl.float32)
    for k in range(K):
        here = (slot == k)[None, :] & routed
        holds = tl.sum(here.to(tl.int32), axis=1) > 0
        expert = tl.sum(tl.where(here, new, 0), axis=1)
        share = tl.sum(tl.where(here, weight, 0.0), axis=1)  # of one slot: nothing is rounded
        same = holds[:, None] & (new == expert[:, None])
        total += tl.where(same, share[:, None], 0.0)
    return total


@triton.jit
def keep_distinct(
    scratch, num_active, own, new, changes, met, E_PAD: tl.constexpr
):  # fmt: skip
    """Ids of a tile whose slots in `met` are free: unused members of A, then own experts.

    As csrc/reroute_distinct.h, for all slots at once. `changes`: slots of the rows concerned.
    """
    taken = changes & (met == 0)
    freed = changes & met
    # The n-th member of A that the row lacks: n, and those before it that the row has.
    nth = tl.cumsum(freed.to(tl.int32), axis=1) - 1
    place = tl.load(scratch + PLACE * E_PAD + new, mask=taken, other=0)
    lower = taken[:, None, :] & (new[:, None, :] < new[:, :, None])
    unused_before = place - tl.sum(lower.to(tl.int32), axis=2)
    skipped = taken[:, None, :] & (unused_before[:, None, :] <= nth[:, :, None])
    index = nth + tl.sum(skipped.to(tl.int32), axis=2)
    fits = freed & (index < num_active)
    filler = tl.load(scratch + LISTED * E_PAD + index, mask=fits, other=0)

    # A row that holds all of A: own experts, those that the row holds replaced by what it gave up.
    surplus = freed & (fits == 0)
    own_in = tl.load(scratch + AFTER * E_PAD + own, mask=changes, other=0) != 0
    takes = surplus & own_in
    gave_up = changes & (own_in == 0) & (surplus == 0)
    turn = tl.cumsum(takes.to(tl.int32), axis=1) - 1
    offer = tl.cumsum(gave_up.to(tl.int32), axis=1) - 1
    fitting = gave_up[:, None, :] & (offer[:, None, :] == turn[:, :, None])
    donated = tl.sum(tl.where(fitting, own[:, None, :], 0), axis=2)
    takes = takes & (tl.sum(fitting.to(tl.int32), axis=2) > 0)
    rest = tl.where(fits, filler, tl.where(takes, donated, own))
    return tl.where(freed, rest, new)


@triton.jit
def apply(
    ids, weights, scale, control, row_class, scratch, num_active, start, num_valid,
    id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
    DISTINCT: tl.constexpr,
):  # fmt: skip
    row, slot, inside, expert, weight, routed, primary, rho = load_rows(
        ids, weights, control, row_class, start, num_valid, id_stride, weight_stride,
        E, K, K_PAD, TILE,
    )  # fmt: skip
    new, moves, _ = resolve(scratch, expert, routed, primary, rho, E_PAD)
    rewrite = moves & (moves == 0)  # weights
    if scale is not None:
        weight = weight * tl.load(scale + expert * E + new, mask=moves, other=1.0)
        rewrite = moves
    if DISTINCT:
        moved_row = tl.max(moves.to(tl.int32), axis=1) > 0
        earlier = (slot[None, :] < slot[:, None])[None, :, :]
        twins = (new[:, None, :] == new[:, :, None]) & routed[:, None, :] & earlier
        met = routed & moved_row[:, None] & (tl.sum(twins.to(tl.int32), axis=2) > 0)
        met_in_row = tl.max(met.to(tl.int32), axis=1)
        if tl.max(met_in_row, axis=0) > 0:
            changes = routed & (met_in_row > 0)[:, None]
            total = sum_met(slot, new, weight, routed, K, K_PAD, TILE)
            weight = tl.where(changes, tl.where(met, 0.0, total), weight)
            new = keep_distinct(scratch, num_active, expert, new, changes, met, E_PAD)
            rewrite = rewrite | changes
    # Every thread has read the tile before any thread writes to it.
    tl.debug_barrier()
    at = row[:, None] * id_stride + slot[None, :]
    tl.store(ids + at, new, mask=inside & (new != expert))
    if (scale is not None) | DISTINCT:
        at = row[:, None] * weight_stride + slot[None, :]
        tl.store(weights + at, weight, mask=rewrite)


@triton.jit
def finish(
    ids, counters, scratch, rerouted, critical, rows_after_usable, num_rows, num_valid, id_stride,
    E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
    DISTINCT: tl.constexpr,
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
        fallback = lowest + tl.zeros([K_PAD], tl.int32)
        if DISTINCT:  # the lowest of A, which may be fewer than K
            active = tl.load(scratch + AFTER * E_PAD + expert)
            listed = tl.where(slot < tl.sum(active, axis=0), slot, 0)
            fallback = tl.load(scratch + LISTED * E_PAD + listed)
        pad = tl.where(rows_after_usable > 0, pad, fallback)
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
