"""What re-routing makes of long text that the model writes by itself.

    python -m benchmarks.free_running                the demo model, about ten minutes

Held-out prompts, 512 tokens each, in batches of one size. Greedy: the token at which the text first
differs from that of exact routing (512 where it never does). Sampled at temperature 1: perplexity
of what was written under exact routing, where the model's own samples have the first row's. Small
errors that add up over a text would show here, and not in `benchmarks.quality`, which forces the
text. Writes ``free_running.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import write_result
from benchmarks.serving.experiment import IMPORTS_CHECKOUT, heldout_prompts
from sere_sglang.measure.intervals import interval
from sere_sglang.measure.routing import counted_exactly, static_settings
from sere_sglang.measure.server import Server, serve
from sere_sglang.measure.weight import Weigher
from sere_sglang.profile import MoeModelInfo

MODEL = Path(__file__).resolve().parents[1] / "demo_model"
LOSSES = (0.1, 0.06, 0.035, 0.02, 0.01)
EXACT = "exact"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder")
    parser.add_argument("--texts", type=int, default=24, help="prompts")
    parser.add_argument("--batch", type=int, default=8, help="decode batch")
    parser.add_argument("--tokens", type=int, default=512, help="to write after each prompt")
    parser.add_argument("--folder", type=Path, default=MODEL.parent / "out" / "free_running")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [text.prompt_ids for text in heldout_prompts(asked.model)[: asked.texts]]
    rows: list[dict[str, Any]] = []
    print(f"{'rule':>20} {'point':>18} {'bytes':>6} {'differs at':>20} {'perplexity':>22}")
    with serve(
        asked.model, folder / "server.log", "--moe-backend=sere", env=IMPORTS_CHECKOUT
    ) as server:
        weigh = Weigher(server, MoeModelInfo.from_folder(str(asked.model)).num_experts)
        exact: list[list[int]] = []
        for rule, settings in _points(weigh.top_k):
            server.set_sere(**settings, reset_counters=True)
            greedy = _written(server, prompts, asked.batch, asked.tokens, temperature=0)
            sampled = _written(server, prompts, asked.batch, asked.tokens, temperature=1)
            exact = exact or greedy
            row = {"rule": rule, "point": server.sere()["operating_point"]["name"]}
            rows.append(row | weigh.shares() | _figures(server, prompts, exact, greedy, sampled))
            _print(rows[-1])
            path = write_result("free_running", rows, model=asked.model.name, batch=asked.batch)
    print(f"wrote {path}")


def _points(top_k: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Exact routing twice: what differs in the second is what ties and rounding make differ."""
    for _ in range(2):
        yield EXACT, counted_exactly(top_k)
    for rule in ("similarity", "piggyback"):
        for primary_k in range(1, top_k - 1):
            yield rule, static_settings(primary_k) | {"rule": rule}
    for loss in LOSSES:
        yield "energy, surrogates", static_settings(1) | {"rule": "energy", "quality_budget": loss}


def _written(
    server: Server, prompts: Sequence[list[int]], batch: int, tokens: int, temperature: float
) -> list[list[int]]:
    """Token ids behind each prompt."""
    sampling = {"temperature": temperature, "max_new_tokens": tokens, "ignore_eos": True}
    written = []
    for first in range(0, len(prompts), batch):
        body = {"input_ids": prompts[first : first + batch], "sampling_params": sampling}
        answers = server.post("/generate", body, timeout=3600)
        written += [answer["output_ids"] for answer in answers]
    return written


def _figures(
    server: Server,
    prompts: Sequence[list[int]],
    exact: Sequence[list[int]],
    greedy: Sequence[list[int]],
    sampled: Sequence[list[int]],
) -> dict[str, Any]:
    differs = np.array([_first_difference(*pair) for pair in zip(exact, greedy, strict=True)])
    nll = np.array([_nll(server, *pair) for pair in zip(prompts, sampled, strict=True)])
    low, high = interval(nll, np.mean)
    return {
        "differs_at": float(differs.mean()),
        "differs_at_ci": list(interval(differs, np.mean)),
        "perplexity": float(np.exp(nll.mean())),
        "perplexity_ci": [float(np.exp(low)), float(np.exp(high))],
    }


def _first_difference(ours: list[int], theirs: list[int]) -> int:
    different = np.flatnonzero(np.array(ours) != np.array(theirs))
    return int(different[0]) if len(different) else len(ours)


def _nll(server: Server, prompt: list[int], written: list[int]) -> float:
    """Nats per token. A prefill is routed exactly, whatever is set."""
    answer = server.post(
        "/generate",
        {
            "input_ids": prompt + written,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": len(prompt) - 1,
        },
    )
    scored = answer["meta_info"]["input_token_logprobs"][1:]
    # SGLang scores the vocabulary's last token as token 0 (ScheduleBatch.prepare_for_extend).
    own = [p for (p, token, *_), asked in zip(scored, written, strict=True) if token == asked]
    assert len(own) > 0.9 * len(written)
    return -float(np.mean(own))


def _print(row: dict[str, Any]) -> None:
    spans = {name: "{:.4g} [{:.4g}, {:.4g}]".format(row[name], *row[f"{name}_ci"])
             for name in ("differs_at", "perplexity")}  # fmt: skip
    print(
        f"{row['rule']:>20} {row['point']:>18} {row['bytes_share']:>6.0%} "
        f"{spans['differs_at']:>20} {spans['perplexity']:>22}",
        flush=True,
    )


if __name__ == "__main__":
    main()
