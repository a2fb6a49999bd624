"""What each rule of re-routing costs in quality, at the bytes it loads.

    python -m benchmarks.quality                     the demo model, half an hour on a quiet machine
    python -m benchmarks.quality --model FOLDER      yours, beside its data/heldout_prompts.jsonl

Held-out text, teacher-forced, in batches of one size; the reference is the same server with SERE
switched off, in the same batches. A surrogate counts as loaded for every expert that a batch lost.
Intervals are bootstrapped over sequences. Writes
``quality.json``, and ``quality_FOLDER.json`` of a model that is not the demo's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks._common import write_result
from benchmarks.serving.calibrated import calibrated, own_text, shipped
from benchmarks.serving.equal_bytes import compared, mean_ratios, print_compared
from benchmarks.serving.experiment import IMPORTS_CHECKOUT, heldout_prompts
from benchmarks.serving.rule_points import RULES, SCALED, ForcedBatches, curve
from sere_sglang.measure import forcing
from sere_sglang.measure.server import serve
from sere_sglang.measure.weight import Weigher
from sere_sglang.profile import MoeModelInfo

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (4, 8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "demo_model", help="model folder")
    parser.add_argument("--data", type=Path, help="calibrate anew on this text")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "quality", help="for logs")
    parser.add_argument("--seeds", type=int, default=3, help="ways to put sequences together")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="decode batches")
    parser.add_argument(
        "--rules", nargs="+", default=RULES, choices=(*RULES, SCALED), metavar="RULE"
    )
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    profile = _profile(asked.model, asked.data, folder, asked.rules)
    texts = heldout_prompts(asked.model)
    flags = ["--moe-backend=sere", f"--sere-profile={profile}", "--chunked-prefill-size=16384"]
    servers: list[tuple[list[str], list[str]]] = [([], [r for r in asked.rules if r != SCALED])]
    if SCALED in asked.rules:
        servers.append((["--sere-scale"], [SCALED]))
    experts = MoeModelInfo.from_folder(str(asked.model)).num_experts
    walked: dict[tuple[int, int], ForcedBatches] = {}
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("decoding", total=len(asked.batches) * asked.seeds * len(asked.rules))
        for extra, rules in servers:
            with serve(
                asked.model, folder / "server.log", *flags, forcing.SERVER_FLAG, *extra,
                env=IMPORTS_CHECKOUT,
            ) as server:  # fmt: skip
                weigh = Weigher(server, experts)
                for batch, seed in ((b, s) for b in asked.batches for s in range(asked.seeds)):
                    if (batch, seed) not in walked:
                        walked[batch, seed] = ForcedBatches(weigh, texts, batch, seed)
                    about = {"model": asked.model.name, "batch": batch, "seed": seed}
                    for rule in rules:
                        found = walked[batch, seed].measured(weigh, rule)
                        rows += [about | row for row in found]
                        path = _write(asked.model.name, rows, asked.rules)
                        bar.advance(task)
    _print(_compare(rows, asked.rules), asked.rules)
    print(f"wrote {path}")


def _write(model: str, rows: list[dict[str, Any]], rules: list[str]) -> Path:
    """What there is so far: an end before the end costs only what was not measured."""
    shown = [{key: value for key, value in row.items() if key != "_kl"} for row in rows]
    name = "quality" if model == "demo_model" else f"quality_{model}"
    return write_result(name, shown, model=model, at_equal_bytes=_compare(rows, rules))


def _profile(model: Path, data: Path | None, folder: Path, rules: Sequence[str]) -> Path:
    """The model's own, where it has what the rules need."""
    own = shipped(model) if data is None and SCALED not in rules else None
    out = folder / "sere_profile.safetensors"
    measures = ("frobenius", "residual")  # what `--sere-scale` multiplies by
    return own or calibrated(model, out, data or own_text(model), measures=measures)


def _compare(rows: list[dict[str, Any]], rules: list[str]) -> list[dict[str, Any]]:
    """All batch sizes at equal bytes; points are means over seeds."""
    table = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        own = {
            rule: [r for r in rows if (r["rule"], r["batch"]) == (rule, batch)] for rule in rules
        }
        curves = {rule: curve(found) for rule, found in own.items() if found}
        if rules[0] in curves:
            table += [{"batch": batch} | row for row in compared(curves, rules[0])]
    return table


def _print(table: list[dict[str, Any]], rules: list[str]) -> None:
    print(f"KL to exact routing, nats per token, and its ratio to {rules[0]}'s at equal bytes")
    print_compared(table, "batch", "rule")
    mean = mean_ratios(table)
    print("mean ratio: " + ", ".join(f"{rule} {ratio:.2f}" for rule, ratio in mean.items()))


if __name__ == "__main__":
    main()
