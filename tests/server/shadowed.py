"""Requests that ``--sere-shadow`` scores again, and what pulls the brake."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.server.harness import Server
from tests.server.profiles import write_profile

PROMPTS = [f"request number {i} " * (1 + i % 4) for i in range(24)]
TOKENS = 24
MAX_KL = 0.02
HARSH = {"enabled": True, "min_batch": 1, "primary_k": 1, "max_kl": MAX_KL}


def sure_of_its_tokens(checkpoint: Path, folder: Path) -> Path:
    """That model in `folder`, made so sure that what re-routing does is large beside a prefill's
    rounding."""
    shutil.copytree(checkpoint, folder)
    for file in folder.glob("model*.safetensors"):
        weights = load_file(file)
        if "lm_head.weight" in weights:
            weights["lm_head.weight"] *= 6
            save_file(weights, file, metadata={"format": "pt"})
    write_profile(folder)  # of these weights
    return folder


def assert_ranks_brake_together(server: Server) -> None:
    """All ranks, or replicas, of a server whose model is sure of its tokens."""
    server.set_sere(enabled=False, policy="static", threshold=0.0, shadow=1.0)
    exact = tokens(generate(server, temperature=0))
    server.set_sere(**HARSH)
    assert tokens(generate(server, temperature=0)) != exact
    until(lambda: server.sere()["braked"] is not None)
    states = [state["sere"] for state in server.get("/server_info")["internal_states"]]
    assert not any(state["enabled"] or state["failed"] for state in states)
    reports = [state["shadow_report"] for state in states]
    assert all(report == reports[0] and report["low"] > MAX_KL for report in reports)
    assert tokens(generate(server, temperature=0)) == exact
    server.set_sere(enabled=True, max_kl=None)
    assert tokens(generate(server, temperature=0)) != exact


def generate(server: Server, prompts: list[str] = PROMPTS, **sampling: Any) -> list[Any]:
    asked = {"temperature": 1.0, "max_new_tokens": TOKENS, "ignore_eos": True, **sampling}
    answers = server.post("/generate", {"text": prompts, "sampling_params": asked})
    for answer in answers:
        assert not [key for key in answer["meta_info"] if "logprob" in key], "nobody asked for it"
    return answers


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def tokens(answers: list[Any]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]
