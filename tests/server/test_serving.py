"""A server with ``--moe-backend sere`` under real requests."""

from __future__ import annotations

import concurrent.futures
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.checkpoints import EXPERTS, LAYERS, TOP_K
from tests.server.harness import Server, run

PROMPTS = [f"request number {i} " * (1 + i % 4) for i in range(8)]


def _tokens(answers: list[Any]) -> list[list[int]]:
    return [a["output_ids"] for a in answers]


def test_server_info_says_so(sere: Server) -> None:
    info = sere.get("/server_info")
    assert info["moe_backend"] == "sere"
    assert info["sere_primary_k"] == 1
    assert Path(info["sere_profile"]).name == "sere_profile.safetensors"
    assert info["sere"]["layers"] == list(range(LAYERS))
    state = info["internal_states"][0]["sere"]
    assert (state["enabled"], state["primary_k"], state["threshold"]) == (True, 1, 0.0)


def test_active_experts_fall_with_s(sere: Server) -> None:
    after = []
    for primary_k in range(1, TOP_K):
        sere.set_sere(primary_k=primary_k, reset_counters=True)
        sere.generate(PROMPTS, 8)
        rows = list(sere.sere()["counters"].values())
        after.append(sum(r["active_after"] / r["forwards"] for r in rows) / LAYERS)
        for row in rows:
            assert row["active_after"] <= row["active_before"] <= EXPERTS * row["forwards"]
            assert row["rows"] == len(PROMPTS) * row["forwards"]
    assert after == sorted(after)
    assert after[0] < after[-1]


def test_threshold_one_keeps_every_expert(sere: Server) -> None:
    sere.set_sere(enabled=False)
    exact = _tokens(sere.generate(PROMPTS, 8))
    sere.set_sere(enabled=True, primary_k=TOP_K - 1, threshold=1.0, reset_counters=True)
    assert _tokens(sere.generate(PROMPTS, 8)) == exact
    for row in sere.sere()["counters"].values():
        assert row["rerouted"] == 0
        assert row["active_after"] == row["active_before"]
        assert row["critical"] > 0


def test_prefill_is_untouched(sere: Server) -> None:
    sere.set_sere(reset_counters=True)
    on = sere.generate(PROMPTS, 1, logprob_start_len=0)
    assert all(row["forwards"] == 0 for row in sere.sere()["counters"].values())
    sere.set_sere(enabled=False)
    off = sere.generate(PROMPTS, 1, logprob_start_len=0)
    for a, b in zip(on, off, strict=True):
        assert a["meta_info"]["input_token_logprobs"] == b["meta_info"]["input_token_logprobs"]


def test_batch_limits(sere: Server) -> None:
    sere.set_sere(min_batch=4, max_batch=6, reset_counters=True)
    for size, rerouted in ((2, False), (5, True), (8, False)):
        sere.set_sere(reset_counters=True)
        sere.generate(PROMPTS[:size], 6)
        forwards = sere.sere()["counters"]["0"]["forwards"]
        assert (forwards > 0) == rerouted, f"batch of {size}"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"primary_k": 0}, "primary_k"),
        ({"primary_k": TOP_K}, "primary_k"),
        ({"primary_k": "two"}, "primary_k"),
        ({"threshold": 1.5}, "threshold"),
        ({"enabled": 1}, "enabled"),
        ({"max_batch": 0}, "max_batch"),
        ({"primary_S": 1}, "primary_S"),
        ([1], "object"),
    ],
)
def test_wrong_live_setting_is_refused_with_a_reason(sere: Server, change: Any, named: str) -> None:
    before = sere.sere()
    with pytest.raises(urllib.error.HTTPError) as refusal:
        sere.post("/set_internal_state", {"server_args": {"sere": change}})
    assert refusal.value.code == 400
    assert named in refusal.value.read().decode()
    after = sere.sere()
    assert {k: after[k] for k in ("enabled", "primary_k", "threshold", "max_batch")} == {
        k: before[k] for k in ("enabled", "primary_k", "threshold", "max_batch")
    }


def test_sglangs_own_live_settings_still_work(sere: Server) -> None:
    body = {"server_args": {"pp_max_micro_batch_size": 8}}
    assert sere.post("/set_internal_state", body) == [True]
    assert sere.post("/set_internal_state", {"server_args": {"no_such_key": 1}}) == [False]


def test_64_concurrent_requests_lose_none(sere: Server) -> None:
    def one(i: int) -> int:
        body = {
            "text": f"client {i}: " + "words " * (1 + i % 40),
            "sampling_params": {
                "temperature": 0.8,
                "max_new_tokens": 4 + i % 23,
                "ignore_eos": True,
            },
        }
        return len(sere.post("/generate", body)["output_ids"])

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        lengths = list(pool.map(one, range(64)))
    assert lengths == [4 + i % 23 for i in range(64)]


def test_lengths_mixed_with_prefill(sere: Server) -> None:
    """New prompts arrive while others decode; every request gets all of its tokens."""

    def one(i: int) -> int:
        time.sleep(0.05 * i)
        sampling = {"temperature": 0, "max_new_tokens": 60 - 3 * i, "ignore_eos": True}
        text = "x" * (3 + 50 * (i % 5))
        answer = sere.post("/generate", {"text": text, "sampling_params": sampling})
        return len(answer["output_ids"])

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(12))) == [60 - 3 * i for i in range(12)]


def test_streaming(sere: Server) -> None:
    chunks = _stream(sere, max_tokens=12)
    assert len(chunks) >= 3
    whole = sere.post(
        "/v1/completions",
        {"model": "m", "prompt": "stream me", "max_tokens": 12, "temperature": 0,
         "ignore_eos": True},
    )  # fmt: skip
    # The other side of the same request: one answer, same text.
    assert "".join(chunks) == whole["choices"][0]["text"]


def test_sglangs_own_eval_runs_through(sere: Server, tmp_path: Path) -> None:
    """docs/measuring.md tells users of it."""
    data = tmp_path / "questions.jsonl"
    lines = [{"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(12)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "sglang.test.run_eval", f"--base-url={sere.url}",
               "--eval-name=gsm8k", f"--gsm8k-data-path={data}", "--num-shots=1",
               "--num-examples=4", "--num-threads=4", "--api=completion",
               "--max-tokens=8"]  # fmt: skip
    sere.set_sere(reset_counters=True, enabled=True, primary_k=1, threshold=0.0)
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "gsm8k_score" in done.stdout
    assert sum(row["rerouted"] for row in sere.sere()["counters"].values()) > 0


def test_abort_frees_the_request(sere: Server) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 1500, "ignore_eos": True}
    body = {"text": "never ending", "rid": "to-abort", "sampling_params": sampling}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(sere.post, "/generate", body)
        time.sleep(1.0)
        request = urllib.request.Request(
            sere.url + "/abort_request",
            json.dumps({"rid": "to-abort"}).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=30).close()
        answer = running.result(timeout=600)
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(answer["output_ids"]) < 1500
    assert len(sere.generate(["still there"], 4)[0]["output_ids"]) == 4


def _stream(server: Server, *, max_tokens: int) -> list[str]:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)
    chunks = client.completions.create(
        model="m",
        prompt="stream me",
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return [choice.text for chunk in chunks for choice in chunk.choices]
