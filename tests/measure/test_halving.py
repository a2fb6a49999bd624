"""The search behind ``sere-sglang tune``, on measures that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sere_sglang.measure.halving import Target, Trial, halve, rounds_of

BUDGETS = [float(x) for x in np.geomspace(0.002, 0.5, 12)]


def test_rounds_halve_and_end_on_everything() -> None:
    rounds = rounds_of(12, 64)
    assert rounds == [(12, 8), (4, 21), (2, 64)]
    assert rounds_of(2, 64) == [(2, 64)] and rounds_of(3, 4) == [(3, 4), (2, 4)]


@pytest.mark.parametrize("target", [0.004, 0.02, 0.1])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_largest_budget_that_stays_below(target: float, noise: float) -> None:
    rng = np.random.default_rng(0)

    def measure(budget: float, samples: int) -> Trial:
        error = noise * rng.normal() / math.sqrt(samples / 16)
        return Trial(budget, samples, 1.3 * budget * math.exp(error))

    best, seen = halve(BUDGETS, 64, Target(target, "below"), measure)
    assert best is not None and best.samples == 64 and best.value <= target
    assert best.candidate == pytest.approx(target / 1.3, rel=0.5 if noise else 0.06)
    assert sum(t.samples for t in seen) < 0.6 * 64 * len(BUDGETS), "less than all on everything"


def test_the_smallest_budget_that_is_fast_enough() -> None:
    def measure(budget: float, samples: int) -> Trial:
        return Trial(budget, samples, 1.0 + 2.0 * math.sqrt(budget))

    best, _ = halve(BUDGETS, 64, Target(1.4, "above"), measure)
    assert best is not None and 1.4 <= best.value < 1.43


@pytest.mark.parametrize(("value", "stay"), [(1e-6, "below"), (90.0, "above")])
def test_a_target_that_nothing_meets(value: float, stay: str) -> None:
    target = Target(value, "below" if stay == "below" else "above")
    best, seen = halve(BUDGETS, 64, target, lambda c, n: Trial(c, n, 1 + c))
    assert best is None and seen


def test_a_target_that_everything_meets() -> None:
    best, _ = halve(BUDGETS, 64, Target(50.0, "below"), lambda c, n: Trial(c, n, c))
    assert best is not None and best.candidate == BUDGETS[-1]
