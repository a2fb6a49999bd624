"""One layer under the rules beside ``similarity``: scores, classes of rows, what is made up for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sere_sglang import apply_rule
from sere_sglang.names import RowClass
from sere_sglang.ops.rules import applied, load_rules
from sere_sglang.ops.rules_check import checked
from sere_sglang.ops.surrogates import Surrogates
from sere_sglang.profile.rule_errors import EnergyWeights
from sere_sglang.runtime.counters import FIELDS, LOSS_UNIT
from sere_sglang.runtime.rule_stage import RuleForward, RuleStage
from sere_sglang.schedule.point import OFF, OperatingPoint

ROWS, EXPERTS, TOP_K, SIZE = 9, 12, 4, 16
WEIGHTS = EnergyWeights(fill=0.75, renormalize=0.5)


def _config(scoring: str, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"scoring_func": scoring, "custom_routing_function": None, "correction_bias": None} | more
    )


def _stage(surrogates: Surrogates | None = None) -> RuleStage:
    counters = torch.zeros(len(FIELDS), dtype=torch.int64)
    implementation = load_rules("auto", "cpu")
    return RuleStage(3, EXPERTS, 2.25, implementation, counters, surrogates, weights=WEIGHTS)


def _routed(scores: torch.Tensor, factor: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = scores.topk(TOP_K)
    return ids, factor * weights / weights.sum(1, keepdim=True)


POINTS = (
    OperatingPoint(True, 2, rule="piggyback"),
    OperatingPoint(True, 2, rule="topk"),
    OperatingPoint(True, rule="budget", experts=5),
    OperatingPoint(True, rule="energy", loss=0.05),
)


@pytest.mark.parametrize("point", POINTS, ids=str)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_is_the_public_function_on_the_routers_scores(point: OperatingPoint, scoring: str) -> None:
    """`apply_rule` with the scores that SGLang's router of this kind computes."""
    logits = torch.randn(ROWS, EXPERTS, generator=torch.Generator().manual_seed(0))
    scores = {
        "softmax": logits.softmax(-1),
        "sigmoid": logits.sigmoid(),
        "sqrtsoftplus": torch.nn.functional.softplus(logits).sqrt(),
    }[scoring]
    ids, weights = _routed(scores)
    call = checked(
        point.rule, ids, weights, scores=scores, k0=point.primary_k or None,
        budget=point.experts or None, loss=min(1.0, point.loss * 2.25), num_valid=7,
        fill_weight=WEIGHTS.fill, renormalize=WEIGHTS.renormalize,
        protected=torch.arange(ROWS) == 1, fast=torch.arange(ROWS) == 2,
    )  # fmt: skip
    want = applied(call)
    classes = torch.tensor([0, RowClass.EXACT, RowClass.FAST, 0, 0, 0, 0], dtype=torch.uint8)
    stage = _stage()
    stage.apply(ids, weights, logits, _config(scoring), RuleForward(point, 7, classes, 1, True))
    assert torch.equal(ids, want.ids.long()) and torch.equal(weights, want.weights)
    counted = dict(zip(FIELDS, stage.counters.tolist(), strict=True))
    assert (counted["forwards"], counted["rows"]) == (1, 7)
    assert counted["active_after"] == len(set(want.ids[:7][want.weights[:7] != 0].tolist()))
    assert want.lost is not None
    lost = want.lost[torch.arange(ROWS) != 2].square().sum().item() / 7
    assert counted["loss"] * LOSS_UNIT == pytest.approx(lost, abs=1e-6)
    if point.rule == "energy":
        assert lost <= point.loss * stage.loss_unit


def test_a_router_without_scores_drops_without_filling() -> None:
    logits = torch.randn(ROWS, EXPERTS, generator=torch.Generator().manual_seed(1))
    closed = _config("softmax", custom_routing_function=lambda: None)
    ids, weights = _routed(logits.softmax(-1))
    want = apply_rule(
        "energy",
        ids,
        weights,
        scores=logits.softmax(-1),
        loss=0.1 * 2.25,
        renormalize=WEIGHTS.renormalize,
    )
    _stage().apply(ids, weights, logits, closed, RuleForward(OperatingPoint(
        True, rule="energy", loss=0.1), -1, None, 1, True))  # fmt: skip
    assert torch.equal(ids, want.ids.long()) and torch.equal(weights, want.weights)


def test_surrogates_make_up_for_what_was_lost() -> None:
    generator = torch.Generator().manual_seed(2)
    inward, outward = torch.randn(2, EXPERTS, 3, SIZE, generator=generator)
    bias = torch.randn(EXPERTS, SIZE, generator=generator)
    own = Surrogates.build(inward, outward, bias, device="cpu")
    stage = _stage(own)
    logits = torch.randn(ROWS, EXPERTS, generator=generator)
    hidden = torch.randn(ROWS, SIZE, generator=generator)
    ids, weights = _routed(logits.softmax(-1))
    before_ids, before = ids.clone(), weights.clone()
    point = OperatingPoint(True, rule="energy", loss=0.08)
    stage.apply(ids, weights, logits, _config("softmax"), RuleForward(point, -1, None, 1, True))
    kept = torch.zeros(ROWS, EXPERTS).scatter_add_(1, ids, weights)
    plain = torch.zeros(ROWS, EXPERTS).scatter_add_(1, before_ids, before)
    assert torch.equal(kept, plain.where(kept > 0, 0.0)), "what is loaded keeps its weight"
    lost = plain - kept
    assert lost.any()
    each = torch.einsum("th,erh,erk->tek", hidden, own.inward.float(), own.outward.float())
    want = torch.einsum("te,tek->tk", lost, each + own.bias.float())
    assert stage.compensation(hidden) is hidden
    output = torch.ones(ROWS, SIZE)
    stage.add_compensation(output, hidden)
    torch.testing.assert_close(output - 1, want, rtol=1e-4, atol=1e-4)
    assert stage.compensation(hidden) is None, "once"


def test_what_a_runner_has_taken_is_not_added_behind_it() -> None:
    inward, outward = torch.randn(2, EXPERTS, 3, SIZE)
    stage = _stage(Surrogates.build(inward, outward, torch.randn(EXPERTS, SIZE), device="cpu"))
    stage.share = 0.5
    ids, weights = _routed(torch.rand(ROWS, EXPERTS))
    point = OperatingPoint(True, rule="energy", loss=0.08)
    stage.apply(ids, weights, None, _config("softmax"), RuleForward(point, -1, None, 1, True))
    hidden, output = torch.randn(2, ROWS, SIZE)
    begun, before = stage.compensation(hidden), output.clone()
    taken = stage.take_compensation()
    assert begun is not None and taken is not None and taken.lost.any()
    assert (taken.surrogates, taken.scale) == (stage.surrogates, 0.5)
    assert torch.equal(stage.add_compensation(output, begun), before)
    assert stage.take_compensation() is None


@pytest.mark.parametrize("surrogates", [True, False])
def test_experts_weigh_what_their_surrogates_leave(surrogates: bool) -> None:
    """Where those make up for it; the counters are in the same unit."""
    generator = torch.Generator().manual_seed(3)
    inward, outward = torch.randn(2, EXPERTS, 3, SIZE, generator=generator)
    bias = torch.zeros(EXPERTS, SIZE)
    stage = _stage(Surrogates.build(inward, outward, bias, device="cpu"))
    stage.expert_loss = torch.rand(EXPERTS, generator=generator) * 2
    logits = torch.randn(ROWS, EXPERTS, generator=generator)
    ids, weights = _routed(logits.softmax(-1))
    own, other = (
        applied(checked(
            "energy", ids, weights, scores=logits.softmax(-1), loss=0.08 * 2.25,
            expert_loss=cost, fill_weight=0.0 if surrogates else WEIGHTS.fill,
            renormalize=0.0 if surrogates else WEIGHTS.renormalize,
        ))
        for cost in (stage.expert_loss, None)
    )  # fmt: skip
    assert not torch.equal(own.ids, other.ids), "a case that shows it"
    want, cost = (own, stage.expert_loss) if surrogates else (other, torch.ones(EXPERTS))
    point = OperatingPoint(True, rule="energy", loss=0.08)
    forward = RuleForward(point, -1, None, 1, surrogates)
    stage.apply(ids, weights, logits, _config("softmax"), forward)
    assert torch.equal(ids, want.ids.long()) and torch.equal(weights, want.weights)
    assert want.lost is not None
    spent = (want.lost.square() * cost).sum().item() / ROWS
    counted = dict(zip(FIELDS, stage.counters.tolist(), strict=True))["loss"] * LOSS_UNIT
    assert counted == pytest.approx(spent, abs=1e-6) and counted <= 0.08 * stage.loss_unit


@pytest.mark.parametrize("surrogates", [True, False])
def test_a_layer_that_is_left_exact_loses_nothing(surrogates: bool) -> None:
    ids, weights = _routed(torch.rand(ROWS, EXPERTS))
    before = ids.clone(), weights.clone()
    point = OperatingPoint(True, rule="energy", loss=0.5, layers=((3, OFF),))
    forward = RuleForward(point, -1, None, 1, surrogates)
    stage = _stage()
    stage.apply(ids, weights, None, _config("softmax"), forward)
    assert torch.equal(ids, before[0]) and torch.equal(weights, before[1])
    assert not stage.counters.any() and stage.compensation(torch.zeros(ROWS, SIZE)) is None
