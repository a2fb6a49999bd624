"""The phases of the rules beside ``similarity`` in Triton, for triton/rule_kernels.py to call.

vote        rows -> which experts are in use, which are in A at once; under energy what each weighs
add_scores  rows -> under budget what each expert's scores add up to
choose      experts -> A
fill        rows -> new ids and weights, what was lost, counts (triton/rule_rows.py)
finish      padding rows, counters, active experts

They share a scratch: flags per expert, laid out as those of re-routing (triton/phases.py), and
int64 sums in units of 2^-32, to which who adds first does not matter.
"""

# mypy: disable-error-code="no-untyped-def"
# Parameters of kernels are Triton's pointers and tensors, which have no static types.

from __future__ import annotations

import triton
import triton.language as tl

from sere_sglang.ops import rule_block, rules_call
from sere_sglang.ops.triton.phases import AFTER, BEFORE, LISTED, PRIMARY, load_slots, rank_slots

PIGGYBACK = tl.constexpr(rules_call.CODES["piggyback"])
BUDGET = tl.constexpr(rules_call.CODES["budget"])
TOPK = tl.constexpr(rules_call.CODES["topk"])
ENERGY = tl.constexpr(rules_call.CODES["energy"])

RULE = tl.constexpr(0)  # words of the rule block, see rule_block.py
VALID = tl.constexpr(1)
KEEP = tl.constexpr(2)
FAST_KEEP = tl.constexpr(3)
MOST = tl.constexpr(4)
FLAGS = tl.constexpr(5)
LOSS = tl.constexpr(6)
FILL_WEIGHT = tl.constexpr(8)
GAMMA = tl.constexpr(9)
WARMUP = tl.constexpr(rule_block.FLAG_WARMUP)
TRUNCATE = tl.constexpr(rule_block.FLAG_TRUNCATE)
LOST = tl.constexpr(rule_block.FLAG_LOST)
CLASSES = tl.constexpr(rule_block.FLAG_CLASSES)
PROTECTED_ROW = tl.constexpr(rule_block.PROTECTED_ROW)
FAST_ROW = tl.constexpr(rule_block.FAST_ROW)

# Rows of the flags that re-routing uses otherwise; A is AFTER, what is in it at once PRIMARY.
HELD = tl.constexpr(3)
LOADED = tl.constexpr(4)

# Behind the E_PAD sums.
SUM_LOST = tl.constexpr(0)
SUM_MOVED = tl.constexpr(1)
SUM_USABLE = tl.constexpr(2)  # T - (first row that padding can copy); 0: there is none
TOTAL_SUMS = 16

ONE = tl.constexpr(float(1 << rules_call.FRACTION_BITS))
LARGEST = tl.constexpr(float(rules_call.LARGEST_TERM))


@triton.jit
def rule_of(block):
    return tl.load(block + RULE)


@triton.jit
def has_flag(block, FLAG: tl.constexpr):
    return (tl.load(block + FLAGS) & FLAG) != 0


@triton.jit
def rule_rows(block, num_rows):
    num_valid = tl.load(block + VALID)
    return tl.where((num_valid < 0) | (num_valid > num_rows), num_rows, num_valid)


@triton.jit
def fixed_point(value):
    """int64 of a float32 >= 0, to nearest, ties to even; scaling by a power of two is exact."""
    scaled = value * ONE
    scaled = tl.where(scaled < LARGEST, scaled, LARGEST)
    whole = scaled.to(tl.int64)
    rest = scaled - whole.to(tl.float32)  # exact: a large one has no fraction
    up = (rest > 0.5) | ((rest == 0.5) & ((whole & 1) == 1))
    return whole + up.to(tl.int64)


@triton.jit
def loss_limit(block, num_valid):
    """int64: the loss budget in units of the sums, rounded down."""
    low = tl.load(block + LOSS).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(block + LOSS + 1).to(tl.int64) << 32
    loss = (low | high).to(tl.float64, bitcast=True)
    return (loss * num_valid.to(tl.float64) * ONE).to(tl.int64)


@triton.jit
def lost_energy(block, expert_loss, expert, weight, held):
    """int64: what losing slots costs: `held` ones, which hold `expert` with `weight`."""
    square = weight * weight
    if expert_loss is not None:
        weighs = held & has_flag(block, LOST)
        square = square * tl.load(expert_loss + expert, mask=weighs, other=1.0)
    return fixed_point(square)


@triton.jit
def kinds_of_rows(block, row_class, row, num_valid, TILE: tl.constexpr):
    """Of a tile of rows: which are protected, which are fast."""
    kind = tl.zeros([TILE], tl.int32)
    if row_class is not None:
        known = (row < num_valid) & has_flag(block, CLASSES)
        kind = tl.load(row_class + row, mask=known, other=0).to(tl.int32)
    return (kind & PROTECTED_ROW) != 0, (kind & FAST_ROW) != 0


@triton.jit
def load_rule_rows(
    ids, weights, block, row_class, start, num_valid, id_stride, weight_stride,
    E: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of valid rows: ids, weights, which slots hold an expert, which are sure of theirs."""
    row, slot, inside, expert, routed = load_slots(
        ids, start, num_valid, id_stride, E, K, K_PAD, TILE
    )
    at = weights + row[:, None] * weight_stride + slot[None, :]
    weight = tl.load(at, mask=inside, other=float("-inf"))
    protected, fast = kinds_of_rows(block, row_class, row, num_valid, TILE)
    keep = tl.where(fast, tl.load(block + FAST_KEEP), tl.load(block + KEEP))
    sure = rank_slots(slot, weight) < keep[:, None]
    return row, slot, inside, expert, tl.where(routed, weight, 0.0), routed, sure, protected, fast


@triton.jit
def vote(
    ids, weights, block, expert_loss, row_class, flags, sums, start, num_rows, num_valid,
    id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Returns T - (the first row without an empty slot, which padding can copy), or 0."""
    row, _, inside, expert, weight, routed, sure, protected, fast = load_rule_rows(
        ids, weights, block, row_class, start, num_valid, id_stride, weight_stride,
        E, K, K_PAD, TILE,
    )  # fmt: skip
    rule = rule_of(block)
    votes = (rule != BUDGET) | has_flag(block, WARMUP)
    one = tl.full([TILE, K_PAD], 1, tl.int32)
    tl.store(flags + BEFORE * E_PAD + expert, one, mask=routed)
    at_once = routed & ((sure & votes) | protected[:, None])
    tl.store(flags + PRIMARY * E_PAD + expert, one, mask=at_once)
    if rule == ENERGY:
        speaks = routed & ((protected | fast) == 0)[:, None]
        energy = lost_energy(block, expert_loss, expert, weight, speaks)
        tl.atomic_add(sums + expert, energy, mask=speaks, sem="relaxed")
    holes = tl.sum((inside & (routed == 0)).to(tl.int32), axis=1)
    whole = (row < num_valid) & (holes == 0)
    return tl.max(tl.where(whole, num_rows - row, 0), axis=0)


@triton.jit
def add_scores(
    scores, block, row_class, sums, start, num_valid,
    E: tl.constexpr, E_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = start + tl.arange(0, TILE)
    column = tl.arange(0, E_PAD)
    _, fast = kinds_of_rows(block, row_class, row, num_valid, TILE)
    speaks = (row < num_valid) & (fast == 0)
    among = speaks[:, None] & (column < E)[None, :]
    score = tl.load(scores + row[:, None] * E + column[None, :], mask=among, other=0.0)
    total = tl.sum(fixed_point(score), axis=0)
    tl.atomic_add(sums + column, total, mask=column < E, sem="relaxed")


@triton.jit
def choose(
    block, flags, sums, expert, num_valid,
    E: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """For a few experts, whether they are in A."""
    rule = rule_of(block)
    column = tl.arange(0, E_PAD)
    every_used = tl.load(flags + BEFORE * E_PAD + column) != 0
    every_in = tl.load(flags + PRIMARY * E_PAD + column) != 0
    used = tl.load(flags + BEFORE * E_PAD + expert) != 0
    member = tl.load(flags + PRIMARY * E_PAD + expert) != 0
    if (rule == BUDGET) | (rule == ENERGY):
        every_sum = tl.load(sums + column)[None, :]
        own_sum = tl.load(sums + expert)[:, None]
        same = every_sum == own_sum
        if rule == BUDGET:
            # By their sum, descending, after those that are in at once.
            lower = same & (column[None, :] < expert[:, None])
            others = ((column < E) & (every_in == 0))[None, :]
            ahead = others & ((every_sum > own_sum) | lower)
            room = tl.load(block + MOST) - tl.sum(every_in.to(tl.int32), axis=0)
            fits = tl.sum(ahead.to(tl.int32), axis=1) < room
            member = member | (fits & (expert < E))
        else:
            # Terms are not negative: what is spent up to an expert says whether it is dropped.
            not_higher = same & (column[None, :] <= expert[:, None])
            droppable = (every_used & (every_in == 0))[None, :]
            before = droppable & ((every_sum < own_sum) | not_higher)
            spent = tl.sum(tl.where(before, every_sum, 0), axis=1)
            member = member | (used & (spent > loss_limit(block, num_valid)))
    some = tl.max(every_used.to(tl.int32), axis=0) > 0
    tl.store(flags + AFTER * E_PAD + expert, (member & some).to(tl.int32))


@triton.jit
def finish(
    ids, weights, counters, active, flags, num_active, moved, lost, rows_after_usable,
    num_rows, num_valid, id_stride, weight_stride,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Padding rows repeat the first valid row without an empty slot, or hold A's lowest."""
    expert = tl.arange(0, E_PAD)
    slot = tl.arange(0, K_PAD)
    if (num_valid < num_rows) & (num_active > 0):
        some = rows_after_usable > 0
        usable = num_rows - rows_after_usable
        copied = (slot < K) & some
        pad = tl.load(ids + usable * id_stride + slot, mask=copied, other=0)
        pad_weight = tl.load(weights + usable * weight_stride + slot, mask=copied, other=0.0)
        lowest = tl.load(flags + LISTED * E_PAD + tl.where(slot < num_active, slot, 0))
        pad = tl.where(some, pad, lowest)
        for start in range(num_valid, num_rows, TILE):
            row = start + tl.arange(0, TILE)
            mask = (row < num_rows)[:, None] & (slot < K)[None, :]
            all_ids = pad[None, :] + tl.zeros([TILE, K_PAD], tl.int32)
            all_weights = pad_weight[None, :] + tl.zeros([TILE, K_PAD], tl.float32)
            tl.store(ids + row[:, None] * id_stride + slot[None, :], all_ids, mask=mask)
            tl.store(weights + row[:, None] * weight_stride + slot[None, :], all_weights, mask=mask)
    if active is not None:
        held = tl.load(flags + HELD * E_PAD + expert)
        tl.store(active + expert, held.to(tl.uint8), mask=expert < E)
    if counters is not None:
        before = tl.sum(tl.load(flags + BEFORE * E_PAD + expert), axis=0)
        after = tl.sum(tl.load(flags + LOADED * E_PAD + expert), axis=0)
        field = tl.arange(0, 8)  # counters.COUNTER_FIELDS, then the loss
        step = tl.where(field == 0, (num_valid > 0).to(tl.int64), 0)
        step = tl.where(field == 1, num_valid.to(tl.int64), step)
        step = tl.where(field == 2, before.to(tl.int64), step)
        step = tl.where(field == 3, after.to(tl.int64), step)
        step = tl.where(field == 4, moved, step)
        step = tl.where(field == 6, lost // tl.maximum(num_valid, 1).to(tl.int64), step)
        total = tl.load(counters + field, mask=field < 7, other=0) + step
        tl.store(counters + field, total, mask=field < 7)
