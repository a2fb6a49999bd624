"""What several modules check of a server, and how they look at it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.server.checkpoints import moe_layer_ids
from tests.server.harness import Server, run

PROMPTS = ["hello world", "the quick brown fox", "a", "jumps over the lazy dog, twice"]


def exact_then_rerouted(sere: Server, architecture: str) -> list[list[float]]:
    """Log-probabilities with SERE off; with it on, every layer re-routes."""
    sere.set_sere(enabled=False, reset_counters=True)
    exact = _log_probs(sere)
    assert all(row["forwards"] == 0 for row in sere.sere()["counters"].values())

    sere.set_sere(enabled=True, primary_k=1, threshold=0.0, reset_counters=True)
    sere.generate(PROMPTS, 8)
    counters = sere.sere()["counters"]
    assert [int(layer) for layer in counters] == moe_layer_ids(architecture)
    for row in counters.values():
        assert row["forwards"] >= 7
        assert row["active_after"] < row["active_before"]
        assert row["rerouted"] > 0
    return exact


def assert_same(plain: Server, exact: list[list[float]]) -> None:
    """Not bit for bit: with the flag our CPU MoE runner replaces SGLang's, which rounds to
    bfloat16 in other places."""
    for want, got in zip(_log_probs(plain), exact, strict=True):
        assert got == pytest.approx(want, abs=0.08)


def _log_probs(server: Server) -> list[list[float]]:
    """Of every prompt's own tokens."""
    answers = server.generate(PROMPTS, 1, logprob_start_len=0)
    return [[entry[0] for entry in a["meta_info"]["input_token_logprobs"][1:]] for a in answers]


def top(url: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return run(
        [sys.executable, "-m", "sere_sglang.cli.main", "top", url, *flags], {"COLUMNS": "120"}
    )
