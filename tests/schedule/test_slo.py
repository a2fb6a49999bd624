"""The closed loop against a simulated server: it holds the target, and no more than that."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.feedback import NO_FEEDBACK
from tests.schedule.plant import POLICY, Plant, rungs_within
from tests.schedule.toy_model import expectation, settings


def _extremes(rows: int) -> tuple[float, float]:
    """Step time of exact routing and of the strongest skipping within the budget."""
    within = [step for _, step in rungs_within(rows, SETTINGS.quality_budget)]
    return within[0], within[-1]


SETTINGS = settings(policy="slo", quality_budget=0.3, tpot_slo_ms=1.0)


@pytest.mark.parametrize("where", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("rows", [16, 48])
def test_holds_a_target_between_plain_and_the_strongest(rows: int, where: float) -> None:
    plain, strongest = _extremes(rows)
    target = strongest + where * (plain - strongest)
    plant = Plant(settings(policy="slo", quality_budget=0.3, tpot_slo_ms=target))
    plant.run(rows, 1500)
    held = np.array(plant.times[500:])
    assert np.median(held) <= 1.03 * target
    assert np.median(held) >= 0.85 * target, "skips more than needed"
    # Settled: few changes of the operating point once it has been found.
    points = plant.points[500:]
    changes = sum(a != b for a, b in itertools.pairwise(points))
    assert changes <= 24, f"{changes} changes in {len(points)} steps"


def test_returns_to_exact_when_there_is_slack() -> None:
    plain, strongest = _extremes(48)
    target = (plain + strongest) / 2
    plant = Plant(settings(policy="slo", quality_budget=0.3, tpot_slo_ms=target))
    plant.run(4, 400)
    assert not any(p.enabled for p in plant.points[200:]), "exact routing holds the target"
    plant.run(48, 800)
    assert plant.points[-1].enabled
    assert np.median(plant.times[-200:]) <= 1.03 * target
    plant.run(4, 1200)
    assert not plant.points[-1].enabled


def test_an_impossible_target_costs_no_more_than_the_budget() -> None:
    plant = Plant(settings(policy="slo", quality_budget=0.05, tpot_slo_ms=0.5))
    plant.run(48, 400)
    tables = expectation()
    for point in plant.points:
        if point.enabled:
            assert tables.effect(48, point)[1] <= 0.05
    assert plant.points[-1].enabled


def test_exact_before_anything_was_measured() -> None:
    composition = BatchComposition("decode", decode_tokens=48)
    assert not POLICY.decide(composition, SETTINGS, NO_FEEDBACK).enabled
