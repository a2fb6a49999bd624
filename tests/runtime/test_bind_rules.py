"""Which rules a server can be had under, and what a GPU layer's surrogates have to be scaled by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher

from sere_sglang.errors import SereError
from sere_sglang.options import SereConfig
from sere_sglang.runtime import bind_rules
from sere_sglang.runtime.bind import Binding
from sere_sglang.runtime.bind_rules import (
    OTHERS,
    layer_rules,
    resolve_rules,
    unavailable_rules,
)
from sere_sglang.runtime.runners import output_factor, output_share


def _router(**more: Any) -> SimpleNamespace:
    known: dict[str, Any] = {
        "scoring_func": "softmax", "custom_routing_function": None, "correction_bias": None,
        "apply_routed_scaling_factor_on_output": False, "routed_scaling_factor": None,
        "renormalize": True, "use_grouped_topk": False,
    }  # fmt: skip
    return SimpleNamespace(**known | more)


def _layer(factor: float | None = None, **more: Any) -> SimpleNamespace:
    known: dict[str, Any] = {
        "layer_id": 0, "reduce_results": False, "moe_tp_size": 2, "moe_ep_size": 1,
        "dispatcher": object.__new__(StandardDispatcher), "parameters": lambda: [],
        "moe_runner_config": SimpleNamespace(routed_scaling_factor=factor),
    }  # fmt: skip
    return SimpleNamespace(**known | more)


def test_the_cpu_engine_has_every_rule() -> None:
    assert unavailable_rules("cpu", "similarity", {0: _router()}) == {}


def test_a_gpu_server_has_the_rules_if_it_was_started_under_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bind_rules, "why_unavailable", lambda device: None)
    assert unavailable_rules("cuda", "energy", {0: _router()}) == {}
    found = unavailable_rules("cuda", "similarity", {0: _router()})
    assert set(found) == set(OTHERS)
    assert found["topk"].endswith("start the server with --sere-rule topk")


def test_without_triton_a_gpu_server_has_similarity_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bind_rules, "why_unavailable", lambda device: "impl 'triton': no module")
    found = unavailable_rules("cuda", "energy", {0: _router()})
    assert found == dict.fromkeys(OTHERS, "impl 'triton': no module")
    assert set(unavailable_rules("xpu", "energy", {0: _router()})) == set(OTHERS)


def test_routers_without_scores_are_named_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bind_rules, "why_unavailable", lambda device: None)
    routers = {3: _router(), 4: _router(custom_routing_function=print)}
    for device in ("cpu", "cuda"):
        found = unavailable_rules(device, "energy", routers)
        reason = "the router of MoE layer(s) 4 exposes no scores"
        assert found == dict.fromkeys(("piggyback", "budget"), reason)


@pytest.mark.parametrize(
    ("device", "router", "policy", "auto"),
    [
        ("cpu", {}, None, "energy"),
        ("cuda", {}, None, "energy"),
        ("xpu", {}, None, "similarity"),
        ("cpu", {"custom_routing_function": print}, None, "similarity"),
        ("cuda", {"scoring_func": "of its own"}, None, "similarity"),
        ("cpu", {}, "static", "energy"),
    ],
)
def test_auto_starts_under_what_can_be_had(
    monkeypatch: pytest.MonkeyPatch, device: str, router: Any, policy: str | None, auto: str
) -> None:
    monkeypatch.setattr(bind_rules, "why_unavailable", lambda device: None)
    config = SereConfig(moe_backend="sere", sere_rule="auto", sere_policy=policy)
    choice, rule, unavailable = resolve_rules(
        device, config, {0: _layer(), 3: _layer()}, {0: _router(), 3: _router(**router)}, _profile()
    )
    assert rule == choice.rule == auto and rule not in unavailable
    # The CUDA graphs of a server that starts under similarity have no others.
    assert ("energy" in unavailable) == (device != "cpu" and auto == "similarity")


def test_auto_is_known_where_another_rule_was_asked_for() -> None:
    config = SereConfig(moe_backend="sere", sere_rule="topk")
    choice, rule, _ = resolve_rules("cpu", config, {0: _layer()}, {0: _router()}, _profile())
    assert rule == "topk" and choice.rule == "energy" and choice.surrogates


def test_auto_leaves_surrogates_out_that_cannot_be_scaled() -> None:
    config = SereConfig(moe_backend="sere", sere_rule="auto")
    layer = _layer(2.5, dispatcher=SimpleNamespace())
    choice, _, _ = resolve_rules("cpu", config, {0: layer}, {0: _router()}, _profile())
    assert choice.rule == "energy" and not choice.surrogates


def test_outputs_that_are_added_up_get_a_share_each() -> None:
    assert output_share(_layer()) == 0.5
    assert output_share(_layer(moe_ep_size=2)) == 0.25
    assert output_share(_layer(reduce_results=True)) == 1.0
    assert output_share(_layer(dispatcher=SimpleNamespace())) == 1.0  # an all-to-all


def test_what_the_runner_multiplies_by_is_multiplied_by_too() -> None:
    """Unless the router has done it, the factor is 1, or the model does it (the CPU engine)."""
    assert output_factor(_layer(), _router()) == 1.0
    assert output_factor(_layer(2.5), _router()) == 2.5
    fused = _router(apply_routed_scaling_factor_on_output=True, routed_scaling_factor=2.5)
    assert output_factor(_layer(2.5), fused) == 1.0
    on_cpu = _layer(2.5, parameters=lambda: [torch.zeros(1)])
    assert output_factor(on_cpu, _router()) == 1.0
    assert output_factor(_layer(2.5, dispatcher=SimpleNamespace()), _router()) is None


def _profile() -> Any:
    tables = {"surrogate_bias": torch.zeros(4, 8), "weight_by_rank": torch.tensor([0.5, 0.3])}
    return SimpleNamespace(similarity={0: torch.eye(4)}, tables={0: tables}, rule_errors={})


def test_losses_are_shares_of_what_the_routers_weights_add_up_to() -> None:
    device = torch.device("cpu")

    def mass(**router: Any) -> float:
        rules = layer_rules(_layer(), _router(**router), _profile(), device)
        return rules.words.loss_unit

    assert mass() == pytest.approx(0.64)
    fused = {"apply_routed_scaling_factor_on_output": True, "routed_scaling_factor": 2.5}
    assert mass(**fused) == pytest.approx(2.5**2)
    assert mass(**fused, renormalize=False) == pytest.approx((0.8 * 2.5) ** 2)
    assert mass(**fused, renormalize=False, scoring_func="sigmoid") == pytest.approx(0.64)


def test_surrogates_that_cannot_be_scaled_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    layer = _layer(2.5, dispatcher=SimpleNamespace())
    rules = layer_rules(layer, _router(), _profile(), torch.device("cpu"))
    assert rules.surrogates is None and not rules.words.has_surrogates
    assert "MoE layer 0 gets no surrogates: with --moe-a2a-backend" in caplog.text


def test_experts_are_weighed_where_they_have_surrogates() -> None:
    profile = _profile()
    profile.tables[0] |= {
        "stream_energy": torch.ones(1),
        "expert_energy": torch.tensor([1.0, 1.0, 1.0, 5.0]),
        "surrogate_explained": torch.zeros(2, 4),
    }
    device = torch.device("cpu")
    rules = layer_rules(_layer(), _router(), profile, device)
    assert rules.expert_loss is not None
    assert rules.expert_loss.tolist() == pytest.approx([0.5, 0.5, 0.5, 2.5])
    unscaled = layer_rules(_layer(2.5, dispatcher=SimpleNamespace()), _router(), profile, device)
    assert unscaled.expert_loss is None


def test_layers_whose_surrogates_nobody_adds_are_named() -> None:
    stages: Any = [
        SimpleNamespace(layer_id=i, ran=True, rules=SimpleNamespace(lost=lost))
        for i, lost in enumerate((None, torch.zeros(1, 2), torch.zeros(1, 2)))
    ]
    nothing: Any = None
    binding = Binding("SomeMoe", stages, nothing, nothing, nothing, "triton", nothing)
    with pytest.raises(SereError, match=r"layer\(s\) 1-2 of SomeMoe ran without passing FusedMoE"):
        binding.check_all_ran()
    for stage in stages:
        stage.rules.lost = None
    binding.check_all_ran()
