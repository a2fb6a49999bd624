"""What the rules beside ``similarity`` are expected to do, against batches that are drawn here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sere_sglang import apply_rule
from sere_sglang.names import RULES
from sere_sglang.schedule.adaptive import AdaptivePolicy
from sere_sglang.schedule.feedback import NO_FEEDBACK
from sere_sglang.schedule.ladder import Ladders
from sere_sglang.schedule.point import OFF, OperatingPoint, described
from sere_sglang.schedule.rule_tables import rule_tables
from tests.schedule.toy_model import (
    COST,
    ENERGY,
    EXPERTS,
    LAYERS,
    TOP_K,
    decode,
    expectation,
    settings,
)

OTHERS = RULES[1:]
HOW_HARD = {
    "piggyback": OperatingPoint(True, 2, rule="piggyback"),
    "topk": OperatingPoint(True, 2, rule="topk"),
    "budget": OperatingPoint(True, rule="budget", experts=24),
    "energy": OperatingPoint(True, rule="energy", loss=0.03),
}


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("batch", [4, 16, 64])
def test_is_what_the_rule_does_to_batches_of_this_popularity(rule: str, batch: int) -> None:
    point = HOW_HARD[rule]
    rng = np.random.default_rng(batch)
    weights = np.sqrt(ENERGY) / np.sqrt(ENERGY).sum()  # of a row: they add up to 1
    active, loss = [], []
    for _ in range(200 // batch + 20):
        by_rank = expectation().layers[0].by_rank
        ids = np.stack([rng.choice(EXPERTS, TOP_K, False, by_rank[0]) for _ in range(batch)])
        routed = torch.tensor(ids), torch.tensor(np.tile(weights, (batch, 1)), dtype=torch.float32)
        scores = torch.zeros(batch, EXPERTS).scatter_(1, *routed)
        done = apply_rule(
            rule, *routed, scores=scores, k0=point.primary_k or None, budget=point.experts or None,
            loss=point.loss,
        )  # fmt: skip
        active.append(len(set(done.ids[done.weights != 0].tolist())))
        assert done.lost is not None
        loss.append(done.lost.square().sum().item() / batch)
    known = expectation().of(rule)
    row, column = known.row_of(batch), known.points.index(_nearest(known.points, point))
    assert known.active[row, 0, column] == pytest.approx(np.mean(active), rel=0.1, abs=0.7)
    if rule == "energy":
        assert known.loss[row, 0, column] >= 0.8 * np.mean(loss), "what it may lose"
    elif rule != "topk":  # there weights of slots whose expert stays are lost too
        assert known.loss[row, 0, column] == pytest.approx(np.mean(loss), rel=0.15, abs=2e-3)


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("batch", [1, 3, 8, 100, 5000])
def test_ladders_lead_from_exact_to_the_hardest_skipping(rule: str, batch: int) -> None:
    ladders = Ladders(expectation().of(rule))
    ladder = ladders.of(batch)
    assert (np.diff(ladder.loss) >= 0).all() and (np.diff(ladder.active) <= 0).all()
    assert ladders.point(batch, 0) == OFF
    for rung in range(1, len(ladder.loss)):
        point = ladders.point(batch, rung)
        assert point.rule == rule
        active, loss = expectation().effect(batch, point)
        assert loss == pytest.approx(ladder.loss[rung], abs=1e-9)
        assert active == pytest.approx(ladder.active[rung])


@pytest.mark.parametrize("rule", OTHERS)
def test_adaptive_stays_within_the_budget(rule: str) -> None:
    policy = AdaptivePolicy(expectation(), COST)
    spent = []
    for budget in (0.001, 0.01, 0.05, 1.0):
        own = settings(rule=rule, quality_budget=budget, min_gain=0.0)
        point = policy.decide(decode(16), own, NO_FEEDBACK)
        loss = expectation().effect(16, point)[1] if point.enabled else 0.0
        assert loss <= budget and (not point.enabled or point.rule == rule)
        if rule == "energy" and point.enabled:
            layers = [point.at(layer) for layer in range(LAYERS)]
            assert np.mean([p.loss if p.enabled else 0.0 for p in layers]) <= budget
        spent.append(loss)
    assert spent == sorted(spent) and spent[-1] > spent[0]


@pytest.mark.parametrize("point", [OFF, *HOW_HARD.values(), OperatingPoint(True, 3, 0.25)], ids=str)
def test_a_point_is_read_back_from_what_is_shown(point: OperatingPoint) -> None:
    assert described(point.describe()) == point
    if point.enabled:
        whole = OperatingPoint(
            True, point.primary_k, point.threshold, ((0, point), (3, OFF)), point.rule,
            point.experts, point.loss,
        )  # fmt: skip
        assert described(whole.describe()) == whole and described(whole.describe()).at(3) == OFF


def _nearest(points: tuple[OperatingPoint, ...], to: OperatingPoint) -> OperatingPoint:
    return min(
        points,
        key=lambda p: (
            abs(p.loss - to.loss) + abs(p.experts - to.experts) + abs(p.primary_k - to.primary_k)
        ),
    )


def test_a_layers_share_of_the_budget_is_spent_before_it_is_named() -> None:
    """Loss stays what the budget says; what it drops is that of the layer's share."""
    by_rank = np.full((TOP_K, EXPERTS), 1.0 / EXPERTS)
    losses = (0.01, 0.02, 0.04)
    points = [OperatingPoint(True, rule="energy", loss=loss) for loss in losses]
    plain, active, loss = rule_tables(by_rank, ENERGY, points)
    half, active_of_half, loss_of_half = rule_tables(by_rank, ENERGY, points, 0.5)
    assert np.array_equal(plain, half) and np.array_equal(loss, loss_of_half)
    assert np.allclose(active_of_half[:, 1:], active[:, :-1])
