"""What ``--sere-rule auto`` is: each case of a profile, a router and a machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from sere_sglang.config_check import checked, for_device, idle_flags, resolved
from sere_sglang.options import SereConfig
from sere_sglang.profile import SereProfile
from sere_sglang.profile.rule_errors import CANDIDATES
from sere_sglang.schedule.auto_rule import RuleChoice, choose_rule
from tests.profile.samples import a_profile

ORDER: dict[str, float] = {
    "similarity": 0.4, "piggyback": 0.3, "budget": 0.25, "energy": 0.2, "surrogates": 0.1,
}  # fmt: skip
CLOSED = dict.fromkeys(("piggyback", "budget"), "the router exposes no scores")


def _profile(
    errors: Mapping[str, float | None], *, has: bool = True, fill: float = 0.5
) -> SereProfile:
    profile = a_profile((0, 2))
    for layer, tables in profile.tables.items():
        if has:
            tables["surrogate_bias"] = torch.zeros(4, 16)
        tables["energy_weights"] = torch.tensor([fill, 0.25, 1.0])
        for name, error in errors.items():
            if error is not None:
                # The layers' own errors differ; what counts is the mean of their logarithms.
                own = error * (4.0 if layer else 0.25)
                tables[f"error_{name}"] = torch.tensor([own / 2, own * 2])
    return profile


def _chosen(profile: SereProfile, **how: Any) -> tuple[str, bool]:
    found = choose_rule(profile, **how)
    return found.rule, found.surrogates


@pytest.mark.parametrize(
    ("errors", "how", "rule", "surrogates"),
    [
        ({}, {}, "energy", True),
        ({}, {"surrogates": False}, "energy", False),
        ({"energy": 0.5, "surrogates": None}, {}, "budget", False),
        ({"piggyback": 0.01}, {}, "piggyback", False),
        ({"similarity": 0.01}, {}, "similarity", False),
        ({"surrogates": 0.21}, {}, "energy", False),
        # What a router without scores, and a machine without kernels, leave.
        ({}, {"has_scores": False, "unavailable": CLOSED}, "energy", True),
        ({"surrogates": None}, {"has_scores": False, "unavailable": CLOSED}, "similarity", False),
        ({}, {"unavailable": {"energy": "no kernel"}}, "budget", False),
        (
            {}, {"unavailable": dict.fromkeys(("energy", "budget", "piggyback", "topk"), "x")},
            "similarity", False,
        ),
    ],
)  # fmt: skip
def test_the_rule_that_errs_least_of_those_that_can_be_had(
    errors: dict[str, float | None], how: dict[str, Any], rule: str, surrogates: bool
) -> None:
    profile = _profile({**ORDER, **errors})
    choice = choose_rule(profile, **how)
    assert (choice.rule, choice.surrogates) == (rule, surrogates)
    assert "errs least on the profile's held-out text" in str(choice)
    assert all(str(candidate) in str(choice) for candidate in profile.rule_errors)


def test_without_scores_energy_is_what_was_measured_only_if_nothing_was_filled() -> None:
    closed: Any = {"has_scores": False, "unavailable": CLOSED}
    some = {"similarity": 0.4, "energy": 0.2}
    assert _chosen(_profile(some), **closed) == ("similarity", False)
    assert _chosen(_profile(some, fill=0.0), **closed) == ("energy", False)


@pytest.mark.parametrize("surrogates", [True, False])
def test_a_profile_that_does_not_compare_them(surrogates: bool) -> None:
    old = _profile({}, has=surrogates)
    assert old.rule_errors == {}
    assert _chosen(old) == ("energy", surrogates)
    assert _chosen(old, surrogates=False) == ("energy", False)
    assert _chosen(old, has_scores=False) == ("similarity", False)
    choice = choose_rule(old, unavailable={"energy": "it has no xpu kernel"})
    assert choice.rule == "similarity" and "it has no xpu kernel" in choice.because


def test_a_rule_must_have_been_measured_in_every_layer() -> None:
    profile = _profile(ORDER)
    del profile.tables[2]["error_surrogates"]
    assert list(map(str, profile.rule_errors)) == ["energy", "budget", "piggyback", "similarity"]
    profile = _profile(ORDER)
    del profile.tables[2]
    assert profile.rule_errors == {} and _chosen(profile) == ("energy", True)


def test_errors_are_geometric_means_best_first() -> None:
    errors = _profile(ORDER).rule_errors
    assert list(errors) == list(reversed(CANDIDATES))
    assert errors[CANDIDATES[0]] == pytest.approx({0: 0.1, 2: 1.6})


def test_surrogates_are_a_setting_of_energy_alone() -> None:
    assert RuleChoice("energy", False, "").settings == {"rule": "energy", "surrogates": False}
    assert RuleChoice("budget", False, "").settings == {"rule": "budget"}


@pytest.mark.parametrize(
    ("given", "device", "rule"),
    [
        ({}, "cpu", "auto"),
        ({}, "cuda", "similarity"),  # where no other has been measured
        ({"sere_rule": "auto"}, "cuda", "auto"),
        ({"sere_surrogates": True}, "cuda", "auto"),
        ({"sere_policy": "static"}, "cpu", "similarity"),
        ({"sere_primary_k": 2}, "cpu", "similarity"),
        ({"sere_policy": "adaptive", "sere_threshold": 0.5}, "cpu", "similarity"),
        ({"sere_scale": True}, "cpu", "similarity"),
        ({"sere_tpot_slo_ms": 5.0, "sere_fast_primary_k": 2}, "cpu", "auto"),
        ({"sere_rule": "energy", "sere_policy": "static"}, "cpu", "energy"),
    ],
)
def test_the_rule_of_a_server_that_is_told_none(
    given: dict[str, Any], device: str, rule: str
) -> None:
    asked = for_device(checked(SereConfig(moe_backend="sere", **given)), device)
    assert asked.rule == resolved(asked, top_k=8).sere_rule == rule


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        ({}, []),
        ({"sere_primary_k": 2, "sere_threshold": 0.5}, []),  # static by these flags
        ({"sere_policy": "adaptive", "sere_primary_k": 2}, ["--sere-primary-k"]),
        ({"sere_policy": "adaptive", "sere_min_gain": 0.1, "sere_quality_budget": 0.1}, []),
        ({"sere_policy": "static", "sere_quality_budget": 0.1}, ["--sere-quality-budget"]),
        ({"sere_primary_k": 2, "sere_min_gain": 0.1}, ["--sere-min-gain"]),
        ({"sere_policy": "static", "sere_rule": "energy", "sere_quality_budget": 0.1}, []),
        ({"sere_tpot_slo_ms": 9.0, "sere_tuned": True}, ["--sere-tuned"]),
    ],
)
def test_flags_that_the_policy_does_not_look_at(given: dict[str, Any], idle: list[str]) -> None:
    assert idle_flags(checked(SereConfig(moe_backend="sere", **given))) == idle
