"""Every architecture of SGLang's standard top-k path serves on the CPU engine, with and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import MOE_ARCHITECTURES, moe_layer_ids
from conftest import SERE
from harness import Server, serve

PROMPTS = ["hello world", "the quick brown fox", "a", "jumps over the lazy dog, twice"]


@pytest.mark.parametrize("architecture", MOE_ARCHITECTURES)
def test_serves_and_matches_plain_when_off(
    architecture: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = checkpoint(architecture)
    with (
        serve(model, tmp_path / "plain.log") as plain,
        serve(model, tmp_path / "sere.log", *SERE) as sere,
    ):
        expected = _log_probs(plain)
        sere.set_sere(enabled=False, reset_counters=True)
        exact = _log_probs(sere)
        # Not bit for bit: with the flag our CPU MoE runner replaces SGLang's, which rounds to
        # bfloat16 in other places.
        for want, got in zip(expected, exact, strict=True):
            assert got == pytest.approx(want, abs=0.08)
        assert all(row["forwards"] == 0 for row in sere.sere()["counters"].values())

        sere.set_sere(enabled=True, primary_k=1, threshold=0.0, reset_counters=True)
        sere.generate(PROMPTS, 8)
        counters = sere.sere()["counters"]
        assert [int(layer) for layer in counters] == moe_layer_ids(architecture)
        for row in counters.values():
            assert row["forwards"] >= 7
            assert row["active_after"] < row["active_before"]
            assert row["rerouted"] > 0


def _log_probs(server: Server) -> list[list[float]]:
    """Per prompt: of its own tokens (prefill), then of one decode step's candidates."""
    answers = server.generate(PROMPTS, 1, logprob_start_len=0)
    return [[entry[0] for entry in a["meta_info"]["input_token_logprobs"][1:]] for a in answers]
