"""Every architecture of SGLang's standard top-k path serves on the CPU engine, with and without."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from checkpoints import MOE_ARCHITECTURES, moe_layer_ids
from conftest import SERE
from harness import Server, serve

PROMPTS = ["hello world", "the quick brown fox", "a", "jumps over the lazy dog, twice"]


@pytest.mark.parametrize("architecture", MOE_ARCHITECTURES)
def test_serves_and_reroutes(
    architecture: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    model = checkpoint(architecture)
    with ExitStack() as stack:
        if architecture == "qwen3_moe":
            sere = request.getfixturevalue("sere")
        else:
            sere = stack.enter_context(serve(model, tmp_path / "sere.log", *SERE))
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

        # One more server per architecture: all of them with SERE_TEST_PLAIN=all.
        if architecture == "qwen3_moe":
            plain = request.getfixturevalue("plain")
        elif os.environ.get("SERE_TEST_PLAIN") == "all":
            plain = stack.enter_context(serve(model, tmp_path / "plain.log"))
        else:
            return
        # Not bit for bit: with the flag our CPU MoE runner replaces SGLang's, which rounds to
        # bfloat16 in other places.
        for want, got in zip(_log_probs(plain), exact, strict=True):
            assert got == pytest.approx(want, abs=0.08)


def _log_probs(server: Server) -> list[list[float]]:
    """Of every prompt's own tokens."""
    answers = server.generate(PROMPTS, 1, logprob_start_len=0)
    return [[entry[0] for entry in a["meta_info"]["input_token_logprobs"][1:]] for a in answers]
