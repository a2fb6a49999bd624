"""The shipped demo model, served, is the model that its card describes, under its best rule."""

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
    log = tmp_path / "log"
    flags = ("--sere-rule=auto", "--sere-policy=static", "--sere-quality-budget=0.05")
    with serve(MODEL, log, "--moe-backend=sere", *flags) as server:
        nats = 0.0
        for text in texts:
            answer = server.generate([text], 1, logprob_start_len=0)[0]
            scored = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]
            nats -= sum(value for value in scored if value is not None)
        # Decoding with re-routing still writes text: no token repeats for ever.
        answers = server.generate(texts[:8], 24)
        state, asked = server.sere(), server.get("/server_info")["sere_rule"]
        counters = state["counters"]
        switched = []
        for change in ({"rule": "similarity", "primary_k": 2}, {"rule": "auto"}):
            server.set_sere(**change, reset_counters=True)
            server.generate(texts[:8], 8)
            switched.append(server.sere())
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    # Pieces open in the middle of a document, without the context the card's figure had.
    assert bits == pytest.approx(card["bits_per_byte"]["all"], abs=0.35)
    assert bits < min(card["ngram_bits_per_byte"].values())
    assert all(len(set(a["output_ids"])) > 6 for a in answers)
    assert all(row["active_after"] < row["active_before"] for row in counters.values())
    # The profile knows: auto is energy with surrogates, when it starts and when it is asked for.
    assert asked == "auto" and state["auto_rule"]["rule"] == "energy"
    assert "--sere-rule auto is energy with surrogates, since it errs least" in log.read_text()
    for now, rule in zip((state, *switched), ("energy", "similarity", "energy"), strict=True):
        assert (now["rule"], now["operating_point"]["rule"]) == (rule, rule)
        lost = [row["loss"] for row in now["counters"].values()]
        assert all(loss > 0 for loss in lost) == (rule == "energy")
    assert switched[-1]["surrogates"]
    assert (MODEL / "model.safetensors").stat().st_size <= 25e6
