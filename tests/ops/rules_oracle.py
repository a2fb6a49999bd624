"""The rules row by row in plain Python, from docs/semantics.md alone: slow, and the judge.

Sums over rows are exact fractions where a rule compares them, so nothing here depends on an order;
weights are Python floats and compared with a tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from tests.ops import oracle

Row = list[int]


@dataclass
class Outcome:
    ids: list[Row]
    weights: list[list[float]]
    active: set[int]
    lost: list[dict[int, float]]  # of each row: expert -> weight
    members: set[int]  # A


@dataclass
class Input:
    rule: str
    ids: list[Row]
    weights: list[list[float]]
    experts: int
    num_valid: int
    protected: list[bool]
    fast: list[bool]
    scores: list[list[float]]
    similarity: list[list[float]]
    keep: int = 1  # S or k0
    fast_keep: int = 1
    threshold: float = 0.0
    budget: int = 1
    warmup: bool = True
    truncate: bool = False
    loss: float = 0.0
    expert_loss: list[float] | None = None
    fill_weight: float = 0.0
    renormalize: float = 0.0


def fixed(value: float) -> int:
    """In units of 2^-32, to the nearest, ties to even; at most 2^12."""
    return min(round(Fraction(value) * 2**32), 2**44)


def sure(case: Input, t: int) -> int:
    """Slots of a row that are sure of their expert, best first."""
    return case.fast_keep if case.fast[t] else case.keep


def float32(value: float) -> float:
    import numpy as np

    return float(np.float32(value))


def lost_energy(case: Input, expert: int, weight: float) -> int:
    """What losing a slot costs; float32 after each multiplication."""
    square = float32(weight * weight)
    return fixed(square if case.expert_loss is None else float32(square * case.expert_loss[expert]))


def by_rank(row: Row, weights: list[float]) -> list[int]:
    """Slots, best first."""
    return sorted(range(len(row)), key=lambda k: (-weights[k], k))


def moved(case: Input) -> list[Row]:
    return oracle.reroute(
        case.ids,
        case.weights,
        case.similarity,
        enabled=True,
        num_valid=case.num_valid,
        classes=[(case.keep, case.threshold), (len(case.ids[0]), 0.0)],
        row_class=[int(p) for p in case.protected],
    ).ids


def members(case: Input) -> set[int]:
    valid = range(case.num_valid)
    ranked = [[case.ids[t][k] for k in by_rank(case.ids[t], case.weights[t])] for t in valid]
    used = {e for row in ranked for e in row} - {-1}
    of_protected = {e for t in valid if case.protected[t] for e in ranked[t]} - {-1}
    union = {e for t in valid for e in ranked[t][: sure(case, t)]} - {-1} | of_protected
    if case.rule in ("piggyback", "topk"):
        return union
    if case.rule == "similarity":
        return {e for t in valid for e in moved(case)[t]} - {-1} if union else set()
    if not used:
        return set()
    if case.rule == "budget":
        chosen = union if case.warmup else of_protected
        speak = [t for t in valid if not case.fast[t]]
        sums = [sum(fixed(case.scores[t][e]) for t in speak) for e in range(case.experts)]
        for e in sorted(range(case.experts), key=lambda e: (-sums[e], e)):
            if len(chosen) >= case.budget:
                break
            chosen = chosen | {e}
        return chosen
    assert case.rule == "energy"
    v = dict.fromkeys(used, 0)
    for t in valid:
        for e, g in zip(case.ids[t], case.weights[t], strict=True):
            if e >= 0 and not case.protected[t] and not case.fast[t]:
                v[e] += lost_energy(case, e, g)
    dropped: set[int] = set()
    spent = 0
    for e in sorted(used - union, key=lambda e: (v[e], e)):
        spent += v[e]
        # The mean over valid rows against the budget.
        if Fraction(spent, 2**32) / case.num_valid > Fraction(case.loss):
            break
        dropped.add(e)
    return used - dropped


def place(case: Input, t: int, chosen: set[int]) -> dict[int, tuple[int, float]]:
    """Slot -> expert and weight, for the slots that are not freed."""
    row, g, p = case.ids[t], case.weights[t], case.scores[t]
    live = [k for k in range(len(row)) if row[k] >= 0]
    mass = sum(g[k] for k in live)
    best = sorted(chosen, key=lambda e: (-p[e], e))
    placed: dict[int, tuple[int, float]] = {}
    if case.rule == "similarity":
        after = moved(case)[t]
        for e in {after[k] for k in live}:
            slots = [k for k in live if after[k] == e]
            placed[slots[0]] = (e, sum(g[k] for k in slots))
        return placed
    if case.rule == "piggyback" or (case.rule == "budget" and not case.truncate):
        placed = {k: (e, p[e]) for k, e in zip(live, best, strict=False)}
        total = sum(weight for _, weight in placed.values())
        return {
            k: (e, weight * mass / total if total else 0.0) for k, (e, weight) in placed.items()
        }
    if case.rule == "topk":
        kept = [k for k in by_rank(row, g)[: sure(case, t)] if k in live]
    else:
        kept = [k for k in live if row[k] in chosen]
    placed = {k: (row[k], g[k]) for k in kept}
    freed = [k for k in live if k not in kept]
    exponent = 1.0
    if case.rule == "energy":
        exponent = case.renormalize
        if case.fill_weight > 0:
            total = sum(p[row[k]] for k in live)
            unit = mass / total if total else 0.0
            others = [e for e in best if e not in {row[k] for k in kept}]
            for k, e in zip(freed, others, strict=False):
                placed[k] = (e, case.fill_weight * unit * p[e])
    new = sum(weight for _, weight in placed.values())
    factor = (mass / new) ** exponent if freed and new else 1.0
    return {k: (e, weight * factor) for k, (e, weight) in placed.items()}


def apply(case: Input) -> Outcome:
    chosen = members(case)
    ids, weights = [list(row) for row in case.ids], [list(row) for row in case.weights]
    lost: list[dict[int, float]] = [{} for _ in ids]
    top_k = len(ids[0]) if ids else 0
    for t in range(case.num_valid if chosen else 0):
        if case.protected[t]:
            continue
        own = case.ids[t]
        live = [k for k in range(top_k) if own[k] >= 0]
        placed = place(case, t, chosen)
        lost[t] = {own[k]: case.weights[t][k] for k in live if own[k] not in chosen}
        unused = sorted(chosen - {e for e, _ in placed.values()})
        surplus = []
        for k in live:
            if k in placed:
                continue
            if unused:
                placed[k] = (unused.pop(0), 0.0)
            else:
                surplus.append(k)
        for k in surplus:
            if own[k] not in chosen:
                placed[k] = (own[k], 0.0)
        for k in surplus:
            if k not in placed:
                held = {e for e, _ in placed.values()}
                placed[k] = (next(own[j] for j in live if own[j] not in held), 0.0)
        for k, (e, weight) in placed.items():
            ids[t][k], weights[t][k] = e, weight
    if chosen:
        whole = [t for t in range(case.num_valid) if min(ids[t]) >= 0]
        for t in range(case.num_valid, len(ids)):
            if whole:
                ids[t], weights[t] = ids[whole[0]], weights[whole[0]]
            else:
                lowest = sorted(chosen)[:top_k]
                ids[t] = lowest + lowest[:1] * (top_k - len(lowest))
                weights[t] = [0.0] * top_k
    active = {e for row in ids[: case.num_valid] for e in row} - {-1}
    return Outcome(ids, weights, active, lost, chosen)
