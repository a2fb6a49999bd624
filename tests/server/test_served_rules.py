"""``--sere-rule`` in a real server: each rule live, qualities of requests, surrogates, refusals."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sere_sglang.names import RULES
from sere_sglang.profile import save_profile
from sere_sglang.schedule.cost import StepModel
from sere_sglang.schedule.trace import read_trace
from tests.server.checkpoints import EXPERTS, LAYERS
from tests.server.cost_files import write_cost
from tests.server.harness import TWO_RANKS, Server, refusal_of, serve
from tests.server.profiles import random_profile

Checkpoint = Callable[[str], Path]
PROMPTS = [f"request number {i} " * (1 + i % 4) for i in range(8)]
STATIC = {"enabled": True, "policy": "static", "min_batch": 1, "primary_k": 1, "threshold": 0.0}
HOW_HARD: dict[str, list[dict[str, Any]]] = {
    "similarity": [{"primary_k": 3}, {"primary_k": 1}],
    "piggyback": [{"primary_k": 3}, {"primary_k": 1}],
    "topk": [{"primary_k": 3}, {"primary_k": 1}],
    "budget": [{"max_experts": EXPERTS - 2}, {"max_experts": 2}],
    "energy": [{"quality_budget": 0.01}, {"quality_budget": 0.5}],
}
"""Mild, then hard."""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace") / "trace.jsonl"


@pytest.fixture(scope="module")
def profile(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With surrogates whose mark on a layer's output nobody can overlook."""
    path = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    own = random_profile(checkpoint("qwen3_moe"))
    size, generator = own.metadata.hidden_size, torch.Generator().manual_seed(1)
    for layer in own.similarity:
        shapes = {"in": (EXPERTS, 2, size), "out": (EXPERTS, 2, size), "bias": (EXPERTS, size)}
        own.tables[layer] = {
            f"surrogate_{name}": torch.randn(*shape, generator=generator).bfloat16()
            for name, shape in shapes.items()
        } | {
            "surrogate_ranks": torch.tensor([2]),
            "surrogate_explained": torch.full((4, EXPERTS), 0.5),
            "expert_energy": torch.ones(EXPERTS),
            "expert_bytes": torch.full((EXPERTS,), 1000),
            "error_batch": torch.tensor([8]),
            "error_active": torch.tensor([0.5]),
            "error_similarity": torch.tensor([0.4]),
            "error_budget": torch.tensor([0.1]),
            "error_energy": torch.tensor([0.3]),
            "error_surrogates": torch.tensor([0.2]),
            # With a strength of 0.75 one expert is so near the edge of the budget that two ranks,
            # which round differently, keep it and one drops it.
            "energy_weights": torch.tensor([0.25, 0.5, 1.0]),
        }
    save_profile(own, path)
    return path


@pytest.fixture(scope="module")
def server(
    checkpoint: Checkpoint, trace: Path, profile: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    # Under static the rule has to be named.
    flags = ("--sere-rule=auto", "--sere-policy=static", "--sere-quality-budget=0.5")
    model, folder = checkpoint("qwen3_moe"), tmp_path_factory.mktemp("logs")
    cost = write_cost(model, folder / "cost.json", step=StepModel())
    given = [f"--sere-profile={profile}", f"--sere-trace={trace}", f"--sere-cost={cost}"]
    with serve(
        model, folder / "log", "--moe-backend=sere", "--enable-metrics", *given, *flags
    ) as server:
        yield server


def test_the_flags_say_what_it_starts_with(server: Server) -> None:
    info = server.get("/server_info")
    state = info["internal_states"][0]["sere"]
    assert (state["rule"], state["policy"], state["quality_budget"]) == ("energy", "static", 0.5)
    assert info["sere_rule"] == "auto" and state["surrogates"]
    assert "errs least" in state["auto_rule"]["because"]
    assert "not to be had here: budget" in state["auto_rule"]["because"], (
        "which static has no B for"
    )
    assert set(info["sere"]["surrogate_bytes"]) == {str(layer) for layer in range(LAYERS)}


def test_auto_is_a_live_setting_too(server: Server) -> None:
    server.set_sere(rule="piggyback", surrogates=False)
    assert (server.sere()["rule"], server.sere()["surrogates"]) == ("piggyback", False)
    server.set_sere(rule="auto")
    state = server.sere()
    assert (state["rule"], state["surrogates"]) == ("energy", True)
    assert {"rule": state["rule"], "surrogates": True}.items() <= state["auto_rule"].items()


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_loads_fewer_experts(server: Server, rule: str) -> None:
    after = []
    for setting in HOW_HARD[rule]:
        counters = _counters(server, rule=rule, **setting)
        for row in counters:
            assert row["active_after"] <= row["active_before"] <= EXPERTS * row["forwards"]
            assert (row["loss"] > 0) == (rule != "similarity" and row["rerouted"] > 0)
            if rule == "energy":
                assert row["loss"] <= setting["quality_budget"] * row["forwards"]
        after.append(sum(row["active_after"] / row["forwards"] for row in counters))
    assert after[1] < after[0]
    point = server.sere()["operating_point"]
    assert point["rule"] == rule and point["enabled"]


@pytest.mark.parametrize("rule", RULES[1:])
def test_an_exact_request_gets_what_plain_routing_gives_it(server: Server, rule: str) -> None:
    server.set_sere(**STATIC | HOW_HARD[rule][1] | {"rule": rule})
    asked = ["exact", "balanced", "fast", None] * 2
    mixed = _ask(server, asked)
    server.set_sere(enabled=False)
    exact = _ask(server, [None] * len(PROMPTS))
    assert any(a != b for a, b in zip(mixed, exact, strict=True)), "nothing was re-routed"
    for i, quality in enumerate(asked):
        if quality == "exact":
            assert mixed[i][0] == exact[i][0]
            assert mixed[i][1] == pytest.approx(exact[i][1], abs=0.02)


@pytest.mark.parametrize("rule", ["piggyback", "topk", "energy"])
def test_fast_requests_are_rerouted_harder(server: Server, rule: str) -> None:
    server.set_sere(**STATIC | HOW_HARD[rule][0] | {"rule": rule}, fast_primary_k=1)
    active = []
    for quality in ("exact", "balanced", "fast"):
        server.set_sere(reset_counters=True)
        _ask(server, [quality] * len(PROMPTS))
        rows = list(server.sere()["counters"].values())
        if quality == "exact":
            assert not any(r["forwards"] for r in rows), "nothing to re-route"
        else:
            active.append(sum(r["active_after"] / r["forwards"] for r in rows))
    assert active[0] > active[1]


def test_metrics_say_what_is_dropped(server: Server) -> None:
    server.set_sere(**STATIC | {"rule": "energy", "quality_budget": 0.3})
    server.generate(PROMPTS, 40)
    with urllib.request.urlopen(server.url + "/metrics") as answer:
        text = answer.read().decode()
    values = {
        name: float(value)
        for name, value in re.findall(r"^sglang:sere_(\w+\{.*\}) (\S+)$", text, re.MULTILINE)
    }

    def only(name: str, **labels: object) -> float:
        (found,) = (
            value
            for key, value in values.items()
            if key.startswith(name + "{") and all(f'{k}="{v}"' in key for k, v in labels.items())
        )
        return found

    assert only("allowed_loss") == pytest.approx(0.3)
    assert only("rule", rule="energy") == 1 and only("rule", rule="similarity") == 0
    for layer in range(LAYERS):
        assert 0 < only("loss", layer=layer) <= 0.3


def test_adaptive_spends_no_more_than_the_budget(server: Server, trace: Path) -> None:
    server.set_sere(rule="energy", policy="adaptive", quality_budget=0.2, min_gain=0.0, min_batch=3)
    before = len(list(read_trace(trace)))
    counters = _counters(server)
    assert all(0 < row["loss"] <= 0.2 * row["forwards"] for row in counters)
    server.set_sere(reset_counters=True)  # and flush
    for _ in range(4):  # exact requests lose nothing, and leave nothing over for the others
        _ask(server, ["exact"] * 3 + [None] * (len(PROMPTS) - 3))
    counters = list(server.sere()["counters"].values())
    assert all(0 < row["loss"] <= 0.2 * row["forwards"] for row in counters)
    server.set_sere(reset_counters=True)
    steps = [s for s in list(read_trace(trace))[before:] if s.point.enabled]
    assert steps and all(s.point.rule == "energy" and 0 < s.point.mean_loss <= 0.2 for s in steps)
    assert {s.budget for s in steps} == {0.2}
    spent = [s.spent_loss for s in steps if s.spent_loss is not None]
    assert spent and 0 < max(spent) <= 0.2


def test_surrogates_are_added_for_what_is_lost(server: Server) -> None:
    """Teacher-forced by the same prompts: with them the answers are others than without."""
    server.set_sere(**STATIC | {"rule": "energy", "quality_budget": 0.5, "surrogates": True})
    with_them = _ask(server, [None] * len(PROMPTS))
    server.set_sere(surrogates=False)
    without = _ask(server, [None] * len(PROMPTS))
    assert with_them != without
    # Nothing is lost: nothing is added.
    server.set_sere(quality_budget=0.0, surrogates=True)
    exactly = _ask(server, [None] * len(PROMPTS))
    server.set_sere(enabled=False)
    assert exactly == _ask(server, [None] * len(PROMPTS))


@pytest.mark.parametrize("experts", [(), ("--ep-size=2",)], ids=["tensor", "expert"])
def test_two_ranks_add_surrogates_once(
    server: Server, checkpoint: Checkpoint, profile: Path, tmp_path: Path, experts: tuple[str, ...]
) -> None:
    """Each adds its share, and the sum is what one rank alone adds."""
    harsh = STATIC | {"rule": "energy", "quality_budget": 0.5, "surrogates": True}
    server.set_sere(**harsh)
    one = _first_decoded(server)
    server.set_sere(surrogates=False)
    without = _first_decoded(server)
    flags = ("--moe-backend=sere", f"--sere-profile={profile}", "--tp-size=2", *experts)
    with serve(checkpoint("qwen3_moe"), tmp_path / "log", *flags, env=TWO_RANKS) as two_ranks:
        two_ranks.set_sere(**harsh)
        two = _first_decoded(two_ranks)
    # Two ranks round differently: some row's first token, or an expert at the edge of its top-k,
    # may be another, and these surrogates make much of that. Twice their sum would move all rows.
    near = [abs(a[1] - b[1]) < 0.1 for a, b in zip(one, two, strict=True)]
    moved = [abs(a[1] - b[1]) > 0.3 for a, b in zip(one, without, strict=True)]
    assert sum(near) > len(PROMPTS) // 2 < sum(moved)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rule": "oea"}, "rule must be one of similarity, piggyback, topk, budget, energy"),
        ({"rule": 3}, "rule must be one of"),
        ({"rule": "budget", "policy": "static", "max_experts": None}, "needs max_experts"),
        ({"max_experts": 0}, "max_experts must be"),
        ({"max_experts": EXPERTS + 1}, f"max_experts must be at most E={EXPERTS}"),
        ({"surrogates": 1}, "surrogates must be true or false"),
        ({"rule": "energy", "quality_budget": 1.01}, "quality_budget must lie in [0, 1]"),
    ],
)
def test_a_wrong_live_setting_is_refused(server: Server, change: Any, named: str) -> None:
    before = server.sere()
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.post("/set_internal_state", {"server_args": {"sere": change}})
    assert refusal.value.code == 400
    assert named in json.loads(refusal.value.read())["error"]["message"]
    assert {k: v for k, v in server.sere().items() if k in change} == {k: before[k] for k in change}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--sere-rule=energy", "--sere-primary-k=2"], "--sere-primary-k is of --sere-rule"),
        (["--sere-rule=piggyback", "--sere-threshold=0.5"], "--sere-threshold is of --sere-rule"),
        (["--sere-rule=budget", "--sere-policy=static"], "needs --sere-max-experts"),
        (["--sere-max-experts=9"], "--sere-max-experts is of --sere-rule budget"),
        (["--sere-primary-k=2", "--sere-surrogates=off"], "--sere-surrogates is of --sere-rule"),
        (["--sere-rule=energy", "--sere-surrogates=on"], "has none; write them with 'sere-sglang"),
        (["--sere-rule=topk", "--sere-primary-k=99"], "--sere-primary-k 99: must be smaller"),
    ],
)
def test_flags_that_do_not_fit_the_rule(
    checkpoint: Checkpoint, flags: list[str], named: str
) -> None:
    model = checkpoint("qwen3_moe")
    result = refusal_of(f"--model-path={model}", "--moe-backend=sere", *flags)
    assert result.returncode == 2
    (line,) = (e for e in result.stderr.splitlines() if e.startswith("sere-sglang: error:"))
    assert named in line


def _counters(server: Server, **settings: Any) -> list[dict[str, float]]:
    """By layer, of PROMPTS decoded together."""
    if settings:
        server.set_sere(**STATIC | settings)
    server.set_sere(reset_counters=True)
    server.generate(PROMPTS, 8)
    return list(server.sere()["counters"].values())


def _first_decoded(server: Server) -> list[tuple[int, float]]:
    """The prefill's token, and one token's log-probability in the first decode step."""
    sampling = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}
    body = {"text": PROMPTS, "sampling_params": sampling, "return_logprob": True}
    answers = server.post("/generate", body | {"token_ids_logprob": [[7]] * len(PROMPTS)})
    return [
        (a["output_ids"][0], a["meta_info"]["output_token_ids_logprobs"][1][0][0]) for a in answers
    ]


def _ask(server: Server, qualities: list[str | None]) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities."""
    sampling = [
        {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        | ({"custom_params": {"sere": quality}} if quality else {})
        for quality in qualities
    ]
    body = {"text": PROMPTS, "sampling_params": sampling, "return_logprob": True}
    answers = server.post("/generate", body)
    return [
        (a["output_ids"], [entry[0] for entry in a["meta_info"]["output_token_logprobs"]])
        for a in answers
    ]
