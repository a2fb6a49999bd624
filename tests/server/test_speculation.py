"""N-gram speculation: batches of draft tokens are verified, and re-routed like any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.experiment import heldout_prompts
from sere_sglang.schedule.trace import read_trace
from tests.server.harness import Server, serve

MODEL = Path(__file__).resolve().parents[2] / "demo_model"
PROMPTS = [text.prompt_ids for text in heldout_prompts(MODEL)[:4]]
TOKENS, TIE = 32, 0.15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speculation")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    flags = (
        "--speculative-algorithm=NGRAM",
        "--moe-backend=sere",
        "--sere-policy=static",
        "--sere-primary-k=1",
        f"--sere-trace={folder / 'trace.jsonl'}",
    )
    with serve(MODEL, folder / "server.log", *flags, whole_batches=False) as served:
        yield served


def _answers(server: Server, qualities: list[str | None]) -> list[dict[str, Any]]:
    """Of all prompts as one batch, which asks for `qualities`."""
    sampling = [
        {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        | ({} if quality is None else {"custom_params": {"sere": quality}})
        for quality in qualities
    ]
    answers: list[dict[str, Any]] = server.post(
        "/generate", {"input_ids": PROMPTS, "sampling_params": sampling}
    )
    return answers


def _is_the_models_own(server: Server, prompt: list[int], answer: dict[str, Any]) -> bool:
    """Whether each token is what exact routing, in one prefill, says comes next."""
    told = server.post(
        "/generate",
        {
            "input_ids": prompt + answer["output_ids"],
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": len(prompt) - 1,
            "top_logprobs_num": 1,
        },
    )["meta_info"]
    own = [entry[0] for entry in told["input_token_logprobs"][1:]]
    best = [entry[0][0] for entry in told["input_top_logprobs"][1:]]
    assert len(own) == TOKENS
    return all(b - o < TIE for b, o in zip(best, own, strict=True))


def test_drafts_are_verified_by_the_model_itself(server: Server) -> None:
    server.set_sere(enabled=False, reset_counters=True)
    answers = _answers(server, [None] * 4)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert _is_the_models_own(server, prompt, answer)
    accepted = [answer["meta_info"]["spec_accept_length"] for answer in answers]
    assert max(accepted) > 1, "drafts were accepted"
    assert all(row["forwards"] == 0 for row in server.sere()["counters"].values())


def test_verified_batches_are_rerouted(server: Server, folder: Path) -> None:
    server.set_sere(enabled=True, rule="similarity", primary_k=1, reset_counters=True)
    answers = _answers(server, [None] * 4)
    counters = server.sere()["counters"]
    assert counters
    for row in counters.values():
        assert row["rerouted"] > 0 and row["active_after"] < row["active_before"]
    assert not all(
        _is_the_models_own(server, prompt, answer)
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ), "S = 1 costs something"
    server.set_sere(enabled=True)  # writes out the trace
    verified = [
        step
        for step in read_trace(folder / "trace.jsonl")
        if step.composition.mode == "verify" and step.point.enabled
    ]
    assert verified and all(step.composition.verify_tokens % 4 == 0 for step in verified[:3])


@pytest.mark.parametrize("rule", ["similarity", "energy"])
def test_an_exact_request_stays_exact_among_them(server: Server, rule: str) -> None:
    """Each of its drafts is a row of its own, and protected."""
    server.set_sere(enabled=True, rule=rule, primary_k=1, quality_budget=0.3, reset_counters=True)
    answers = _answers(server, ["exact", None, "fast", "exact"])
    assert any(row["rerouted"] > 0 for row in server.sere()["counters"].values())
    for at in (0, 3):
        assert _is_the_models_own(server, PROMPTS[at], answers[at])
