"""Re-routing in plain Python loops, written from the specification alone; needs only the stdlib.

Slow and literal on purpose: every implementation is tested against it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

Matrix = Sequence[Sequence[float]]


@dataclass
class Outcome:
    ids: list[list[int]]
    weights: list[list[float]] | None
    counters: dict[str, int]


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def ranks(slots: Sequence[float] | None, top_k: int) -> list[int]:
    """Rank of each slot: heaviest first, equal weights in slot order."""
    if slots is None:
        return list(range(top_k))
    order = sorted(range(top_k), key=lambda k: (-slots[k], k))
    rank = [0] * top_k
    for position, k in enumerate(order):
        rank[k] = position
    return rank


def reroute(
    ids: Sequence[Sequence[int]],
    weights: Matrix | None,
    similarity: Matrix,
    *,
    enabled: bool = True,
    num_valid: int = -1,
    classes: Sequence[tuple[int, float]],
    row_class: Sequence[int] | None = None,
    scale: Matrix | None = None,
    distinct: bool = False,
) -> Outcome:
    """Everything one forward of one layer does; `similarity` and `weights` hold float32 values.

    distinct: rule 8, which needs weights; without, ids and weights are those of rules 1 to 7.
    """
    num_tokens = len(ids)
    top_k = len(ids[0]) if ids else 0
    result = [list(row) for row in ids]
    new_weights = None if weights is None else [list(row) for row in weights]
    counts = dict.fromkeys(
        ("forwards", "rows", "active_before", "active_after", "rerouted", "critical"), 0
    )
    untouched = Outcome(result, new_weights, counts)

    if not enabled:
        return untouched
    if len(classes) == 1:
        if classes[0][0] <= 0 or classes[0][0] >= top_k:
            return untouched
    elif all(s >= top_k for s, _ in classes):
        return untouched

    def is_expert(e: int) -> bool:
        return 0 <= e < len(similarity)

    real = num_tokens if num_valid < 0 else min(num_valid, num_tokens)

    def settings(t: int) -> tuple[int, float]:
        c = 0 if row_class is None else min(row_class[t], len(classes) - 1)
        s, rho = classes[c]
        return max(s, 1), float32(rho)

    # 1. and 2.: rank, vote
    rank = [ranks(None if weights is None else weights[t], top_k) for t in range(num_tokens)]
    primary: set[int] = set()
    for t in range(real):
        s, _ = settings(t)
        for k in range(top_k):
            if (rank[t][k] < s or s >= top_k) and is_expert(ids[t][k]):
                primary.add(ids[t][k])

    # 3.: move
    best: dict[int, tuple[float, int]] = {}
    moved_rows = set()
    for t in range(real):
        s, rho = settings(t)
        if s >= top_k:
            continue
        for k in range(top_k):
            e = ids[t][k]
            if rank[t][k] < s or not is_expert(e) or e in primary or not primary:
                continue
            if e not in best:
                j_star = min(primary, key=lambda j: (-similarity[e][j], j))
                best[e] = (similarity[e][j_star], j_star)
            value, j_star = best[e]
            if rho > 0 and value < rho:
                counts["critical"] += 1
                continue
            result[t][k] = j_star
            counts["rerouted"] += 1
            moved_rows.add(t)
            if scale is not None and new_weights is not None:
                new_weights[t][k] = float32(new_weights[t][k] * float32(scale[e][j_star]))

    # 8.: rows stay distinct. A is what the valid rows hold by now.
    active = {e for row in result[:real] for e in row if is_expert(e)}
    if distinct:
        assert new_weights is not None
        for t in moved_rows:
            live = [k for k in range(top_k) if is_expert(ids[t][k])]
            result[t], new_weights[t] = distinct_row(
                list(ids[t]), result[t], new_weights[t], live, active
            )

    # 5.: padding
    if primary:
        whole = [row for row in result[:real] if min(row) >= 0]
        lowest = sorted(active)[:top_k] if distinct else [min(primary)]
        pad = whole[0] if whole else lowest + lowest[:1] * (top_k - len(lowest))
        for t in range(real, num_tokens):
            result[t] = list(pad)

    if real > 0 and top_k > 0:
        counts["forwards"] = 1
        counts["rows"] = real
        counts["active_before"] = len({e for row in ids[:real] for e in row if is_expert(e)})
        counts["active_after"] = len(active)
    return untouched


def distinct_row(
    own: list[int], moved: list[int], weights: list[float], live: list[int], active: set[int]
) -> tuple[list[int], list[float]]:
    """Rule 8 for one row: `own` before re-routing, `moved` and `weights` after; `live` slots."""
    ids, weights = list(moved), list(weights)
    slots_of: dict[int, list[int]] = {}
    for k in live:
        slots_of.setdefault(moved[k], []).append(k)
    for slots in slots_of.values():
        for k in slots[1:]:
            weights[slots[0]] = float32(weights[slots[0]] + weights[k])
    free = [k for k in live if slots_of[moved[k]][0] != k]
    unused = sorted(active - set(slots_of))
    surplus = free[len(unused) :]
    for k, e in zip(free, unused, strict=False):
        ids[k] = e
    for k in free:
        weights[k] = 0.0
    # Of what the row had and now lacks, a surplus slot takes its own if it can.
    held = {ids[k] for k in live if k not in surplus}
    homeless = [k for k in surplus if own[k] in held]
    for k in surplus:
        if k not in homeless:
            ids[k] = own[k]
            held.add(own[k])
    for k in homeless:
        ids[k] = next(own[j] for j in live if own[j] not in held)
        held.add(ids[k])
    return ids, weights


def by_expert(ids: Sequence[int], weights: Sequence[float]) -> dict[int, float]:
    """What a layer computes of a row: the weight of each expert, without those of weight 0."""
    sums: dict[int, float] = {}
    for e, weight in zip(ids, weights, strict=True):
        sums[e] = sums.get(e, 0.0) + weight
    return {e: weight for e, weight in sums.items() if weight != 0.0}


def published(
    ids: Sequence[Sequence[int]], similarity: Matrix, select_top_k: int, threshold: float
) -> list[list[int]]:
    """What the authors' public kernel does, on what it accepts: sorted slots, ids in range.

    A mask of the experts in the first columns of the batch; then every later slot walks over all
    experts upwards, remembering the first strictly greatest similarity among the masked ones.
    """
    top_k = len(ids[0]) if ids else 0
    if select_top_k <= 0 or select_top_k >= top_k:
        return [list(row) for row in ids]
    num_experts = len(similarity)
    mask = [False] * num_experts
    for row in ids:
        for expert in row[:select_top_k]:
            mask[expert] = True
    out = [list(row) for row in ids]
    for row in out:
        for slot in range(select_top_k, top_k):
            original = row[slot]
            if mask[original]:
                continue
            best_similarity, best_expert = -1e9, 0
            for expert in range(num_experts):
                if mask[expert] and similarity[original][expert] > best_similarity:
                    best_similarity, best_expert = similarity[original][expert], expert
            if not (threshold > 0.0 and best_similarity < float32(threshold)):
                row[slot] = best_expert
    return out
