"""The step model finds back what generated the steps, and says nothing wild from little."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sere_sglang.schedule.adaptive import AdaptivePolicy
from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost import MoeCost, Source, StepFit, StepModel
from sere_sglang.schedule.observer import WINDOW, Observer
from tests.schedule.toy_model import expectation, settings

COST = MoeCost.from_bandwidth(expert_ms=0.1, slot_ms=0.002, num_layers=4, num_experts=64, top_k=8)


def test_a_layer_loads_or_multiplies_whichever_takes_longer() -> None:
    assert COST.moe_ms(8, 4 * 30) == pytest.approx(12.0)
    assert COST.moe_ms(2048, 4 * 64) == pytest.approx(4 * 2048 * 8 * 0.002)
    few_and_many = COST.moe_ms(2048, np.array([4 * 16, 4 * 64]))
    assert few_and_many[0] == few_and_many[1], "compute-bound: fewer experts gain nothing"


@pytest.mark.parametrize("source", ["measured", "file", "bandwidth model"])
@pytest.mark.parametrize("truth", [StepModel(5.0, 0.1, 1.3), StepModel(2.0, 0.0, 0.8)])
def test_fit_finds_the_parameters_of_varied_steps(truth: StepModel, source: Source) -> None:
    rng = np.random.default_rng(0)
    fit = StepFit(source)
    for _ in range(400):
        rows = float(rng.integers(1, 64))
        # Re-routed or not, at the same number of rows: what tells the two apart.
        moe = 26.0 * (1 - 0.9**rows) * rng.choice([0.4, 0.7, 1.0])
        noise = rng.normal(1.0, 0.02)
        fit.observe(rows, moe, noise * float(truth.step_ms(rows, moe)))
    for rows, moe in ((4, 5.0), (32, 20.0), (60, 10.0)):
        assert fit.model.step_ms(rows, moe) == pytest.approx(truth.step_ms(rows, moe), rel=0.06)


def test_steps_that_look_alike_leave_the_scale_to_the_hardware() -> None:
    fit = StepFit("measured")
    for _ in range(50):
        fit.observe(16.0, 10.0, 25.0)
    assert fit.model.step_ms(16.0, 10.0) == pytest.approx(25.0, rel=0.02)
    assert fit.model.scale == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("step_ms", [0.01, 1e4])
@pytest.mark.parametrize(
    ("source", "low", "high"), [("measured", 0.5, 2.0), ("bandwidth model", 0.7, 4.0)]
)
def test_absurd_steps_keep_every_parameter_sane(
    step_ms: float, source: Source, low: float, high: float
) -> None:
    fit = StepFit(source)
    for rows in (1.0, 8.0, 64.0) * 5:
        model = fit.observe(rows, 0.5 * rows, step_ms)
    assert model.fixed_ms >= 0 and model.row_ms >= 0 and low <= model.scale <= high


@pytest.mark.parametrize("step", [None, StepModel(3.0, 0.1, 1.5)])
def test_a_step_that_is_given_is_never_corrected(step: StepModel | None) -> None:
    cost = dataclasses.replace(COST, step=step)
    observer = Observer(AdaptivePolicy(expectation(), cost), cost)
    assert observer.feedback.step == (step or StepModel())
    composition = BatchComposition("decode", decode_tokens=16)
    for _ in range(10 * WINDOW):
        observer.note_step(77.0, composition, 4 * 40.0, settings())
    assert observer.feedback.step_ms == 77.0, "it is measured all the same"
    assert (observer.feedback.step == step) is (step is not None)
