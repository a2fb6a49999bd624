"""static and adaptive on tables of batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sere_sglang.config import live_settings
from sere_sglang.config_check import resolved
from sere_sglang.errors import SereError
from sere_sglang.names import policy_names
from sere_sglang.options import SereConfig
from sere_sglang.profile.tuning import Tuning
from sere_sglang.schedule.adaptive import AdaptivePolicy
from sere_sglang.schedule.auto_rule import RuleChoice
from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost import MoeCost, StepModel
from sere_sglang.schedule.feedback import NO_FEEDBACK, Feedback
from sere_sglang.schedule.observer import WINDOW, Observer
from sere_sglang.schedule.point import OFF, SIMILARITY, OperatingPoint
from sere_sglang.schedule.policy import PolicyContext, choose
from sere_sglang.schedule.registry import make_policy
from sere_sglang.schedule.settings import Limits, Settings
from tests.schedule.toy_model import (
    AUTO,
    COST,
    EXPERTS,
    LAYERS,
    TOP_K,
    decode,
    expectation,
    settings,
)

CONTEXT = PolicyContext(expectation(), COST)
ADAPTIVE = AdaptivePolicy(expectation(), COST)


@pytest.mark.parametrize(
    ("composition", "changes", "on"),
    [
        (decode(8), {}, True),
        (BatchComposition("verify", verify_tokens=24), {}, True),
        (BatchComposition("extend", prefill_tokens=512), {}, False),
        (BatchComposition("mixed", decode_tokens=8, prefill_tokens=512), {}, False),
        (BatchComposition("idle"), {}, False),
        (decode(8), {"enabled": False}, False),
        (decode(8), {"min_batch": 9}, False),
        (decode(9), {"min_batch": 9}, True),
        (decode(8), {"max_batch": 7}, False),
        (decode(7), {"max_batch": 7}, True),
    ],
)
def test_static(composition: BatchComposition, changes: dict[str, Any], on: bool) -> None:
    now = settings(policy="static", **changes)
    point = choose(make_policy("static", CONTEXT), composition, now, NO_FEEDBACK)
    assert point == (OperatingPoint(True, 2, 0.25) if on else OFF)


def test_at_equal_loss_a_larger_batch_skips_harder() -> None:
    strength = []
    for rows in (2, 8, 32, 128):
        point = ADAPTIVE.decide(decode(rows), settings(quality_budget=0.01), NO_FEEDBACK)
        strength.append(point.mean_primary_k)
    assert strength == sorted(strength, reverse=True)
    assert strength[-1] < strength[0]


def test_a_larger_budget_never_makes_a_batch_slower() -> None:
    for rows in (3, 8, 32, 200):
        times = []
        for budget in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0):
            point = ADAPTIVE.decide(decode(rows), settings(quality_budget=budget), NO_FEEDBACK)
            times.append(_active(point, rows))
        assert times == sorted(times, reverse=True)
        assert times[-1] < times[0]


def test_adaptive_takes_what_the_profile_was_tuned_to() -> None:
    tuning = Tuning({SIMILARITY: ((8, 0.01), (32, 0.2))})
    policy = make_policy("adaptive", PolicyContext(expectation(), COST, tuning))
    now = settings(quality_budget=0.05, tuned=True)
    for rows, budget in ((4, 0.01), (8, 0.01), (32, 0.2), (500, 0.2)):
        untuned = dataclasses.replace(now, tuned=False, quality_budget=budget)
        tuned_point = policy.decide(decode(rows), now, NO_FEEDBACK)
        assert tuned_point == ADAPTIVE.decide(decode(rows), untuned, NO_FEEDBACK)
    between = expectation().effect(16, policy.decide(decode(16), now, NO_FEEDBACK))[1]
    assert 0.01 < between <= 0.105
    back = dataclasses.replace(now, tuned=False)
    assert policy.decide(decode(32), back, NO_FEEDBACK) == ADAPTIVE.decide(
        decode(32), back, NO_FEEDBACK
    )
    slo = make_policy("slo", PolicyContext(expectation(), COST, tuning))
    on_target = dataclasses.replace(now, policy="slo", tpot_slo_ms=1.0)
    assert slo.decide(decode(32), on_target, Feedback(budget=0.0)) == OFF, "slo moves its own"


def test_who_names_a_budget_means_that_one() -> None:
    now = settings(tuned=True)
    assert not now.updated({"quality_budget": 0.1}, Limits(TOP_K, AUTO)).tuned
    assert now.updated({"quality_budget": 0.1, "tuned": True}, Limits(TOP_K, AUTO)).tuned
    assert now.updated({"primary_k": 1}, Limits(TOP_K, AUTO)).tuned
    asked = SereConfig(moe_backend="sere", sere_quality_budget=0.05)
    assert live_settings(resolved(asked, top_k=TOP_K)).tuned is False


def test_off_when_there_is_nothing_to_gain() -> None:
    generous = settings(quality_budget=1.0)
    assert ADAPTIVE.decide(decode(32), generous, NO_FEEDBACK).enabled
    # Steps whose time is elsewhere: attention, sampling, a slow host.
    elsewhere = Feedback(step=StepModel(fixed_ms=2000.0))
    assert ADAPTIVE.decide(decode(32), generous, elsewhere) == OFF
    # Compute-bound: the rows take longer to multiply than the experts to load.
    heavy = MoeCost.from_bandwidth(
        expert_ms=0.1, slot_ms=0.05, num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K
    )
    assert AdaptivePolicy(expectation(), heavy).decide(decode(512), generous, NO_FEEDBACK) == OFF
    assert ADAPTIVE.decide(decode(32), settings(quality_budget=0.0), NO_FEEDBACK) == OFF


def test_exact_rows_leave_less_to_gain() -> None:
    now = settings(quality_budget=0.2)
    free = ADAPTIVE.predict(decode(32), SIMILARITY, StepModel())
    half = ADAPTIVE.predict(decode(32, exact_rows=16), SIMILARITY, StepModel())
    assert (half.step_ms >= free.step_ms).all() and (half.loss <= free.loss).all()
    assert ADAPTIVE.decide(decode(32, exact_rows=32), now, NO_FEEDBACK) == OFF


def test_a_batch_of_exact_rows_is_not_re_routed_by_any_policy() -> None:
    now = settings(policy="static", primary_k=1)
    policy = make_policy("static", CONTEXT)
    assert choose(policy, decode(32, exact_rows=31), now, NO_FEEDBACK).enabled
    assert choose(policy, decode(32, exact_rows=32), now, NO_FEEDBACK) == OFF


def test_what_energy_may_lose_is_of_all_rows_already() -> None:
    """Its kernel divides by exact rows too: those that lose nothing leave no budget to others."""
    free = ADAPTIVE.predict(decode(32), "energy", StepModel())
    half = ADAPTIVE.predict(decode(32, exact_rows=16), "energy", StepModel())
    assert (half.loss == free.loss).all() and (half.step_ms >= free.step_ms).all()
    now = settings(rule="energy", quality_budget=0.05)
    for exact_rows in (0, 8, 24):
        point = ADAPTIVE.decide(decode(32, exact_rows=exact_rows), now, NO_FEEDBACK)
        assert point.mean_loss <= 0.05, exact_rows


@hypothesis.settings(deadline=None)
@given(
    rows=st.integers(1, 5000),
    exact=st.floats(0, 1),
    budget=st.floats(0, 1),
    fixed=st.floats(0, 1e3),
    scale=st.floats(0.7, 4),
)
def test_whatever_the_batch_the_loss_stays_within_the_budget(
    rows: int, exact: float, budget: float, fixed: float, scale: float
) -> None:
    composition = decode(rows, exact_rows=int(exact * rows))
    feedback = Feedback(step=StepModel(fixed, 0.0, scale))
    now = settings(quality_budget=budget)
    point = ADAPTIVE.decide(composition, now, feedback)
    assert point == AdaptivePolicy(expectation(), COST).decide(composition, now, feedback)
    if point.enabled:
        active, loss = expectation().effect(rows, point)
        free = 1.0 - composition.exact_rows / rows
        assert free * loss <= budget * (1 + 1e-9)
        plain = expectation().plain_active(rows)
        before, after = (
            feedback.step.step_ms(rows, COST.moe_ms(rows, plain - free * (plain - now_active)))
            for now_active in (plain, active)
        )
        assert before >= after * (1 + now.min_gain) * (1 - 1e-9)
        assert all(1 <= p.primary_k < TOP_K for _, p in point.layers if p.enabled)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"policy": "greedy"}, "policy must be one of static, adaptive, slo"),
        ({"policy": "slo"}, "policy slo needs tpot_slo_ms"),
        ({"quality_budget": 1.5}, "quality_budget must lie in [0, 1]"),
        ({"fast_primary_k": TOP_K}, "fast_primary_k must be in [1, 7]"),
        ({"tpot_slo_ms": -1}, "tpot_slo_ms"),
        ({"min_gain": True}, "min_gain must be a number"),
        ({"bogus": 1}, "unknown key 'bogus'"),
        ({"reset_counters": 1}, "reset_counters must be true or false"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SereError) as refusal:
        settings().updated(changes, Limits(TOP_K, AUTO))
    assert named in str(refusal.value)


def test_settings_that_this_server_cannot_have_are_refused() -> None:
    without = Limits(TOP_K, AUTO, num_experts=EXPERTS, surrogates=False)
    now = settings(surrogates=False)
    with pytest.raises(SereError, match="surrogates: this server's profile has none; calibrate"):
        now.updated({"surrogates": True}, without)
    assert now.updated({"surrogates": False}, without) == now
    assert now.updated({"surrogates": True}, Limits(TOP_K, AUTO)).surrogates
    assert now.updated({"max_experts": EXPERTS}, without).max_experts == EXPERTS
    with pytest.raises(SereError, match=f"max_experts must be at most E={EXPERTS}, a layer's"):
        now.updated({"max_experts": EXPERTS + 1}, without)


def test_auto_is_what_the_server_says_it_is() -> None:
    before = settings(rule="similarity", surrogates=False)
    new = before.updated({"rule": "auto"}, Limits(TOP_K, AUTO))
    assert (new.rule, new.surrogates) == ("energy", True)
    new = before.updated({"rule": "auto", "surrogates": False}, Limits(TOP_K, AUTO))
    assert (new.rule, new.surrogates) == ("energy", False), "who names a setting means that"
    other = RuleChoice("piggyback", False, "")
    new = settings().updated({"rule": "auto"}, Limits(TOP_K, other))
    assert new.rule == "piggyback" and new.surrogates, "which piggyback does not look at"


def test_who_names_s_or_rho_means_a_rule_that_has_it() -> None:
    def rule(before: str, **changes: Any) -> str:
        return settings(rule=before).updated(changes, Limits(TOP_K, AUTO)).rule

    assert rule("energy", primary_k=2) == rule("piggyback", threshold=0.5) == "similarity"
    assert rule("piggyback", primary_k=2) == "piggyback"
    assert rule("energy", fast_primary_k=2, quality_budget=0.1) == "energy"
    assert rule("energy", primary_k=2, rule="energy") == "energy"


def test_settings_survive_the_trip_through_numbers() -> None:
    from sere_sglang.patches.number_keys import flatten, unflatten

    changes = {
        "enabled": False,
        "policy": "slo",
        "primary_k": 3,
        "threshold": 1,
        "max_batch": None,
        "tpot_slo_ms": 12.5,
        "quality_budget": 0.2,
        "reset_counters": True,
    }
    numbers = {key: float(value) for key, value in flatten(changes).items()}
    ours, rest = unflatten(numbers | {"pp_max_micro_batch_size": 8})
    assert ours == changes and rest == {"pp_max_micro_batch_size": 8}
    assert isinstance(settings().updated(ours, Limits(TOP_K, AUTO)), Settings)


def test_third_parties_are_listed_after_ours() -> None:
    assert policy_names()[:3] == ("static", "adaptive", "slo")


def _active(point: OperatingPoint, rows: int) -> float:
    return expectation().effect(rows, point)[0]


def test_a_policy_may_bring_its_own_controller() -> None:
    class Counting:
        budget = 0.0

        def update(self, step_ms: float, *_rest: object) -> float:
            self.budget += 1
            return self.budget

    class Policy:
        def controller(self) -> Counting:
            return Counting()

    observer = Observer(Policy(), COST)
    composition = BatchComposition("decode", decode_tokens=8, padded_rows=8, running=8)
    found = [observer.note_step(1.0, composition, 10.0, settings()) for _ in range(2 * WINDOW)]
    assert [f.budget for f in found if f is not None] == [1.0, 2.0]
