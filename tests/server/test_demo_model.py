"""The shipped demo model, served, is the model that its card describes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.server.harness import serve

MODEL = Path(__file__).resolve().parents[2] / "demo_model"


def test_served_bits_per_byte_clear_the_ngram(tmp_path: Path) -> None:
    card = json.loads((MODEL / "eval.json").read_text())
    lines = (MODEL / "data" / "heldout_prompts.jsonl").read_text().splitlines()
    texts = [entry["prompt"] + entry["continuation"] for entry in map(json.loads, lines)]
    texts = texts[::3]
    flags = ("--moe-backend=sere", "--sere-primary-k=2")
    with serve(MODEL, tmp_path / "log", *flags) as server:
        nats = 0.0
        for text in texts:
            answer = server.generate([text], 1, logprob_start_len=0)[0]
            scored = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]
            nats -= sum(value for value in scored if value is not None)
        # Decoding with re-routing still writes text: no token repeats for ever.
        answers = server.generate(texts[:8], 24)
        counters = server.sere()["counters"]
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    # Pieces open in the middle of a document, without the context the card's figure had.
    assert bits == pytest.approx(card["bits_per_byte"]["all"], abs=0.35)
    assert bits < min(card["ngram_bits_per_byte"].values())
    assert all(len(set(a["output_ids"])) > 6 for a in answers)
    assert all(row["active_after"] < row["active_before"] for row in counters.values())
    assert (MODEL / "model.safetensors").stat().st_size <= 25e6
