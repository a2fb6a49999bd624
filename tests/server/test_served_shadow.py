"""``--sere-shadow`` and ``--sere-max-kl`` on a real server, whose model is sure of its tokens."""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import load_file, save_file

from tests.server.faults import COMPARE, Faults, install
from tests.server.harness import TWO_RANKS, Server, serve
from tests.server.profiles import write_profile

PROMPTS = [f"request number {i} " * (1 + i % 4) for i in range(24)]
TOKENS = 24
MAX_KL = 0.02
EXACT = {"enabled": True, "min_batch": 1000, "max_kl": MAX_KL}
HARSH = {"enabled": True, "min_batch": 1, "primary_k": 1, "max_kl": MAX_KL}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path], faults: Faults) -> Path:
    """Sure of its tokens, so that what re-routing does is large beside a prefill's rounding."""
    model = faults.folder / "model"
    shutil.copytree(checkpoint("qwen3_moe"), model)
    for file in model.glob("model*.safetensors"):
        weights = load_file(file)
        if "lm_head.weight" in weights:
            weights["lm_head.weight"] *= 6
            save_file(weights, file, metadata={"format": "pt"})
    write_profile(model)  # of these weights
    return model


@pytest.fixture(scope="module")
def server(model: Path, faults: Faults) -> Iterator[Server]:
    flags = ("--moe-backend=sere", "--sere-primary-k=1", "--sere-shadow=1", "--enable-metrics")
    log = faults.folder / "server.log"
    with serve(model, log, *flags, env=install(faults.folder)) as server:
        yield server


def test_exact_routing_is_near_zero_and_does_not_brake(server: Server) -> None:
    server.set_sere(**EXACT)
    report = _after(server, len(PROMPTS))
    assert report["window_tokens"] == len(PROMPTS) * (TOKENS - 1), "all but the prefill's token"
    assert 0 <= report["kl"] < MAX_KL / 4 and report["low"] <= report["kl"] <= report["high"]
    state = server.sere()
    assert state["enabled"] and state["braked"] is None and _metric(server, "braked") == 0
    assert _metric(server, "shadow_kl") == pytest.approx(report["kl"])


def test_harsh_settings_brake_until_they_are_released(server: Server) -> None:
    server.set_sere(enabled=False)
    exact = _tokens(_generate(server, temperature=0))
    server.set_sere(**HARSH)
    assert _tokens(_generate(server, temperature=0)) != exact
    _until(lambda: server.sere()["braked"] is not None)
    state = server.sere()
    assert not state["enabled"] and not state["failed"] and f"max_kl {MAX_KL}" in state["braked"]
    assert state["shadow_report"]["low"] > MAX_KL
    assert server.log.read_text().count("SERE brakes, serving goes on with exact routing") == 1
    assert _metric(server, "braked") == 1 and _metric(server, "max_kl") == MAX_KL
    assert _tokens(_generate(server, temperature=0)) == exact
    server.set_sere(enabled=True, max_kl=None)
    assert server.sere()["braked"] is None and _metric(server, "braked") == 0
    assert _tokens(_generate(server, temperature=0)) != exact
    server.set_sere(enabled=False)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampled_requests_show_it_too(server: Server, temperature: float) -> None:
    server.set_sere(**HARSH | {"max_kl": None})
    rerouted = _after(server, len(PROMPTS), temperature=temperature, top_p=0.9)
    server.set_sere(enabled=False)
    exact = _after(server, len(PROMPTS), temperature=temperature, top_p=0.9)
    assert exact["kl"] < MAX_KL / 4 and exact["kl"] < rerouted["kl"] / 4


def test_what_cannot_be_compared_is_left_alone(server: Server) -> None:
    server.set_sere(**HARSH | {"max_kl": None})
    before = _compared(server)
    for sampling in (
        {"custom_params": {"sere": "exact"}},
        {"repetition_penalty": 1.1},
        {"regex": "[ab]*"},
        {"max_new_tokens": 1},
        {"logit_bias": {"5": 1.0}},
    ):
        _generate(server, prompts=PROMPTS[:2], **sampling)
    asked = server.generate(PROMPTS[:1], 4)  # asks for log-probabilities itself
    assert len(asked[0]["meta_info"]["output_token_logprobs"]) == 4
    assert "output_top_logprobs" not in asked[0]["meta_info"]
    _generate(server, prompts=PROMPTS[:3])
    _until(lambda: _compared(server) >= before + 3)
    time.sleep(0.3)
    assert _compared(server) == before + 3


def test_a_request_that_fills_the_context(server: Server, model: Path) -> None:
    """SGLang takes less as an input than a request may come to have."""
    server.set_sere(**HARSH | {"max_kl": None})
    failed = (server.sere()["shadow_report"] or {"failed": 0})["failed"]
    before = _compared(server)
    config = json.loads((model / "config.json").read_text())
    longest = config["max_position_embeddings"] - 24
    sampling = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": [5] * longest, "sampling_params": sampling}
    assert len(server.post("/generate", body)["output_ids"]) == 20
    _until(lambda: _compared(server) == before + 1)
    assert server.sere()["shadow_report"]["failed"] == failed


def test_through_the_openai_api_and_streamed(server: Server) -> None:
    server.set_sere(**HARSH | {"max_kl": None})
    before = _compared(server)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    asked: dict[str, Any] = {"model": "m", "prompt": PROMPTS[3], "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**asked)
    parts = [part.choices[0].text for part in client.completions.create(**asked, stream=True)]
    assert "".join(parts) == whole.choices[0].text and whole.choices[0].logprobs is None
    _until(lambda: _compared(server) == before + 2)


def test_a_comparison_that_fails_hurts_nobody(server: Server, faults: Faults) -> None:
    server.set_sere(**HARSH | {"max_kl": None})
    rerouted = _tokens(_generate(server, temperature=0))
    before = server.sere()["shadow_report"] or {"failed": 0}
    faults.start(COMPARE)
    assert _tokens(_generate(server, temperature=0)) == rerouted
    _until(lambda: (server.sere()["shadow_report"] or before)["failed"] > before["failed"] + 3)
    faults.stop()
    state = server.sere()
    assert state["enabled"] and not state["failed"]
    assert server.log.read_text().count("could not be scored again") == 1, "said once"
    server.set_sere(enabled=True)
    _after(server, len(PROMPTS))


def test_it_can_be_switched_off(server: Server) -> None:
    server.set_sere(shadow=0.0, max_kl=None)
    before = _compared(server)
    _generate(server)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.set_sere(max_kl=0.1)
    assert "max_kl needs shadow" in refusal.value.read().decode()
    time.sleep(0.5)
    assert _compared(server) == before
    server.set_sere(shadow=1.0)
    _after(server, len(PROMPTS))


@pytest.mark.parametrize("ranks", ["--tp-size=2", "--dp-size=2"])
def test_several_ranks_brake_together(model: Path, faults: Faults, ranks: str) -> None:
    flags = ("--moe-backend=sere", "--sere-primary-k=1", "--sere-shadow=1", ranks)
    log = faults.folder / f"{ranks.strip('-')}.log"
    with serve(model, log, *flags, env=TWO_RANKS) as server:
        server.set_sere(enabled=False)
        exact = _tokens(_generate(server, temperature=0))
        server.set_sere(**HARSH)
        assert _tokens(_generate(server, temperature=0)) != exact
        _until(lambda: server.sere()["braked"] is not None)
        states = [state["sere"] for state in server.get("/server_info")["internal_states"]]
        assert not any(state["enabled"] or state["failed"] for state in states)
        reports = [state["shadow_report"] for state in states]
        assert all(report == reports[0] and report["low"] > MAX_KL for report in reports)
        assert _tokens(_generate(server, temperature=0)) == exact
        server.set_sere(enabled=True, max_kl=None)
        assert _tokens(_generate(server, temperature=0)) != exact


def _generate(server: Server, prompts: list[str] = PROMPTS, **sampling: Any) -> list[Any]:
    asked = {"temperature": 1.0, "max_new_tokens": TOKENS, "ignore_eos": True, **sampling}
    answers = server.post("/generate", {"text": prompts, "sampling_params": asked})
    for answer in answers:
        assert not [key for key in answer["meta_info"] if "logprob" in key], "nobody asked for it"
    return answers


def _after(server: Server, requests: int, **sampling: Any) -> dict[str, Any]:
    """The report once so many more were compared; settings have just changed."""
    before = _compared(server)
    _generate(server, **sampling)
    _until(lambda: _compared(server) >= before + requests)
    return server.sere()["shadow_report"]


def _compared(server: Server) -> int:
    report = server.sere()["shadow_report"]
    return int(report["requests"]) if report else 0


def _until(holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def _tokens(answers: list[Any]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def _metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(server.url + "/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found = re.search(rf"^sglang:sere_{name}{{.*}} (\S+)$", text, re.MULTILINE)
    assert found, name
    return float(found[1])
