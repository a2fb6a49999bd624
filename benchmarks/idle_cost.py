"""What SERE costs a server that does not use it: decode speed, installed and idle, against without.

    python -m benchmarks.idle_cost [--rounds 24] [--streams 4 16]

Two servers of the demo model stay up and take turns at the same streams, in an order that is
shuffled every round. Its steps take milliseconds, so that what is added per step shows as it
would not on a large model. ``without``: plain SGLang, on the CPU engine with the same MoE runner.
``off``: ``--moe-backend sere`` switched off. ``exact``: SERE on with a batch it leaves alone, so
that every step is decided, observed and traced to no effect. ``kernel``: S = K - 1, rho = 1, so
that the kernel looks at every row and moves nothing. Writes ``idle_cost.json``: rows
``{"case", "streams", "tok_s", "ratio", "ratio_low", "ratio_high"}``; the ratio to ``without`` is
the median over rounds, low and high bound it at 95 % (bootstrap).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import write_result
from benchmarks.serving.experiment import IMPORTS_CHECKOUT, heldout_prompts
from sere_sglang.measure.intervals import interval
from sere_sglang.measure.load import run_load
from sere_sglang.measure.server import SGLANG, Server, serve

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "demo_model"
TOKENS = 96
CASES: dict[str, dict[str, Any]] = {
    "without": {},
    "off": {"enabled": False},
    "exact": {"enabled": True, "policy": "adaptive", "quality_budget": 0.0},
    "kernel": {"enabled": True, "policy": "static", "threshold": 1.0, "min_batch": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--streams", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "idle_cost")
    arguments = parser.parse_args()
    texts = heldout_prompts(MODEL)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        servers = _servers(stack, arguments.model, arguments.folder.resolve())
        top_k = servers["sere"].sere()["top_k"]
        for streams in arguments.streams:
            prompts = [texts[i % len(texts)].prompt_ids for i in range(streams)]
            rows += _measure(servers, prompts, arguments.rounds, top_k)
    print(f"wrote {write_result('idle_cost', rows, model=arguments.model.name)}")


def _servers(stack: ExitStack, model: Path, folder: Path) -> dict[str, Server]:
    flags = ("--chunked-prefill-size=16384",)
    like = (sys.executable, "-m", "benchmarks.runner_only_server")
    launcher = (SGLANG, "serve") if torch.cuda.is_available() else like
    return {
        "without": stack.enter_context(
            serve(model, folder / "without.log", *flags, env=IMPORTS_CHECKOUT, launcher=launcher)
        ),
        "sere": stack.enter_context(
            serve(model, folder / "sere.log", *flags, "--moe-backend=sere", env=IMPORTS_CHECKOUT)
        ),
    }


def _measure(
    servers: dict[str, Server], prompts: list[list[int]], rounds: int, top_k: int
) -> list[dict[str, Any]]:
    speeds: dict[str, list[float]] = {case: [] for case in CASES}
    order = random.Random(0)
    for at in range(-1, rounds):  # the first one warms up
        for case in order.sample(list(CASES), len(CASES)):
            server = servers["without" if case == "without" else "sere"]
            if case != "without":
                changes = CASES[case] | ({"primary_k": top_k - 1} if case == "kernel" else {})
                server.set_sere(**changes)
            speed = run_load(server, prompts, TOKENS).decode_tok_s
            if at >= 0:
                speeds[case].append(speed)
    print(f"\n{len(prompts)} streams, {rounds} rounds")
    print(f"{'case':10} {'tok/s':>7} {'ratio':>7}   95 %")
    rows = []
    for case, found in speeds.items():
        ratios = [a / b for a, b in zip(found, speeds["without"], strict=True)]
        low, high = interval(ratios)
        row = {
            "case": case,
            "streams": len(prompts),
            "tok_s": statistics.median(found),
            "ratio": statistics.median(ratios),
            "ratio_low": low,
            "ratio_high": high,
        }
        rows.append(row)
        print(f"{case:10} {row['tok_s']:7.0f} {row['ratio']:7.3f}   {low:.3f} .. {high:.3f}")
    return rows


if __name__ == "__main__":
    main()
