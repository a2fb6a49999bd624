"""``--sere-shadow`` and ``--sere-max-kl`` on a real server, whose model is sure of its tokens."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.faults import COMPARE, Faults, install
from tests.server.harness import Server, serve
from tests.server.shadowed import (
    HARSH,
    MAX_KL,
    PROMPTS,
    TOKENS,
    generate,
    sure_of_its_tokens,
    tokens,
    until,
)

EXACT = {"enabled": True, "min_batch": 1000, "max_kl": MAX_KL}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path], faults: Faults) -> Path:
    return sure_of_its_tokens(checkpoint("qwen3_moe"), faults.folder / "model")


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
    exact = tokens(generate(server, temperature=0))
    server.set_sere(**HARSH)
    assert tokens(generate(server, temperature=0)) != exact
    until(lambda: server.sere()["braked"] is not None)
    state = server.sere()
    assert not state["enabled"] and not state["failed"] and f"max_kl {MAX_KL}" in state["braked"]
    assert state["shadow_report"]["low"] > MAX_KL
    assert server.log.read_text().count("SERE brakes, serving goes on with exact routing") == 1
    assert _metric(server, "braked") == 1 and _metric(server, "max_kl") == MAX_KL
    assert tokens(generate(server, temperature=0)) == exact
    server.set_sere(enabled=True, max_kl=None)
    assert server.sere()["braked"] is None and _metric(server, "braked") == 0
    assert tokens(generate(server, temperature=0)) != exact
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
        generate(server, prompts=PROMPTS[:2], **sampling)
    asked = server.generate(PROMPTS[:1], 4)  # asks for log-probabilities itself
    assert len(asked[0]["meta_info"]["output_token_logprobs"]) == 4
    assert "output_top_logprobs" not in asked[0]["meta_info"]
    generate(server, prompts=PROMPTS[:3])
    until(lambda: _compared(server) >= before + 3)
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
    until(lambda: _compared(server) == before + 1)
    assert server.sere()["shadow_report"]["failed"] == failed


def test_through_the_openai_api_and_streamed(server: Server) -> None:
    server.set_sere(**HARSH | {"max_kl": None})
    before = _compared(server)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    asked: dict[str, Any] = {"model": "m", "prompt": PROMPTS[3], "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**asked)
    parts = [part.choices[0].text for part in client.completions.create(**asked, stream=True)]
    assert "".join(parts) == whole.choices[0].text and whole.choices[0].logprobs is None
    until(lambda: _compared(server) == before + 2)


def test_a_comparison_that_fails_hurts_nobody(server: Server, faults: Faults) -> None:
    server.set_sere(**HARSH | {"max_kl": None})
    rerouted = tokens(generate(server, temperature=0))
    before = server.sere()["shadow_report"] or {"failed": 0}
    faults.start(COMPARE)
    assert tokens(generate(server, temperature=0)) == rerouted
    until(lambda: (server.sere()["shadow_report"] or before)["failed"] > before["failed"] + 3)
    faults.stop()
    state = server.sere()
    assert state["enabled"] and not state["failed"]
    assert server.log.read_text().count("could not be scored again") == 1, "said once"
    server.set_sere(enabled=True)
    _after(server, len(PROMPTS))


def test_it_can_be_switched_off(server: Server) -> None:
    server.set_sere(shadow=0.0, max_kl=None)
    before = _compared(server)
    generate(server)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.set_sere(max_kl=0.1)
    assert "max_kl needs shadow" in refusal.value.read().decode()
    time.sleep(0.5)
    assert _compared(server) == before
    server.set_sere(shadow=1.0)
    _after(server, len(PROMPTS))


def _after(server: Server, requests: int, **sampling: Any) -> dict[str, Any]:
    """The report once so many more were compared; settings have just changed."""
    before = _compared(server)
    generate(server, **sampling)
    until(lambda: _compared(server) >= before + requests)
    return server.sere()["shadow_report"]


def _compared(server: Server) -> int:
    report = server.sere()["shadow_report"]
    return int(report["requests"]) if report else 0


def _metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(server.url + "/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found = re.search(rf"^sglang:sere_{name}{{.*}} (\S+)$", text, re.MULTILINE)
    assert found, name
    return float(found[1])
