"""SGLang's own ``select_experts`` with our hooks: fused or not, the layer gets the same experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.server.harness import told_by

SCRIPT = Path(__file__).with_name("fused_seam_script.py")
REROUTED = 4  # in COUNTER_FIELDS


def run(*arguments: str, **env: str) -> dict[str, Any]:
    return told_by(SCRIPT, *arguments, **{"TORCHDYNAMO_DISABLE": "0", **env})


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return run()


@pytest.mark.parametrize("how", ["True", "False", "scaled"])
def test_fused_and_apart_agree(seen: dict[str, Any], how: str) -> None:
    """Renormalized or not, and scaled by SGLang behind ``fused_topk``."""
    apart, fused = seen[how]["apart"], seen[how]["fused"]
    assert (apart["fused"], fused["fused"]) == (0, 1), "calls of the fused op"
    assert fused["ids"] == apart["ids"]
    for ours, theirs in zip(fused["weights"], apart["weights"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert fused["counters"] == apart["counters"], "re-routed once, not twice"
    assert fused["counters"][REROUTED] > 0
    assert fused["ran"] and apart["ran"]


@pytest.mark.parametrize("how", ["off", "no stage"])
def test_without_re_routing_it_is_sglangs_own_top_k(seen: dict[str, Any], how: str) -> None:
    assert seen[how]["fused"] == 0
    assert seen[how]["ids"] == seen["plain"]["ids"]
    assert seen[how]["weights"] == seen["plain"]["weights"]


@pytest.mark.parametrize("how", ["grouped", "biased", "positional"])
def test_other_routers_and_calls_are_re_routed_behind(seen: dict[str, Any], how: str) -> None:
    assert seen[how]["fused"] == 0
    assert seen[how]["counters"][REROUTED] > 0


def test_a_router_that_raises_leaves_nothing_behind(seen: dict[str, Any]) -> None:
    assert seen["after an error"] == {"raised": True, "fused": 0}


def test_compiled_by_torch_the_two_stay_apart(seen: dict[str, Any]) -> None:
    assert seen["compiled"]["fused"] == 0
    assert seen["compiled"]["ids"] == seen["True"]["apart"]["ids"]
    assert seen["compiled"]["counters"] == seen["True"]["apart"]["counters"]


def test_simulated_routing_is_re_routed_behind() -> None:
    found = run("simulate", SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS="1", TRITON_INTERPRET="1")
    assert found["fused"]["fused"] == 0
    assert found["fused"]["ids"] == found["apart"]["ids"]
    assert found["fused"]["counters"] == found["apart"]["counters"]
    assert found["fused"]["counters"][REROUTED] > 0
