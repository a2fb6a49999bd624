"""What each rule of re-routing costs in quality, at the bytes it loads.

    python -m benchmarks.quality                     the demo model, about half an hour
    python -m benchmarks.quality --model FOLDER      yours, beside its data/heldout_prompts.jsonl

Held-out text, teacher-forced, in batches of one size; the reference is the same server with SERE
switched off, in the same batches. A surrogate counts as loaded for every expert that a batch lost.
Intervals are bootstrapped over sequences. Writes
``quality.json``, and ``quality_FOLDER.json`` of a model that is not the demo's.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks._common import write_result
from benchmarks.serving.equal_bytes import Curve, compared, mean_ratios
from benchmarks.serving.experiment import IMPORTS_CHECKOUT, heldout_prompts
from sere_sglang.measure import forcing
from sere_sglang.measure.divergence import divergence
from sere_sglang.measure.intervals import interval
from sere_sglang.measure.routing import static_settings
from sere_sglang.measure.server import serve
from sere_sglang.measure.texts import Text
from sere_sglang.measure.weight import Weigher
from sere_sglang.profile import MoeModelInfo

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (4, 8, 16, 32, 64)
LOSSES = (0.4, 0.2, 0.1, 0.06, 0.035, 0.02, 0.012, 0.006, 0.003, 0.0015)
EXPERTS = (0.2, 0.3, 0.45, 0.6, 0.75, 0.9)  # of those that exact routing loads
SCALED, FIRST = "similarity, scaled", "similarity"
AUTO = "energy, surrogates"
_RULES = (FIRST, "piggyback", "budget", "energy", AUTO)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "demo_model", help="model folder")
    parser.add_argument("--data", type=Path, help="calibration text (default: the model's own)")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "quality", help="for logs")
    parser.add_argument("--seeds", type=int, default=3, help="ways to put sequences together")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="decode batches")
    parser.add_argument("--rules", nargs="+", default=_RULES, choices=_RULES, metavar="RULE")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    profile = _profile(asked.model, asked.data, folder)
    texts = heldout_prompts(asked.model)
    flags = ["--moe-backend=sere", f"--sere-profile={profile}", "--chunked-prefill-size=16384"]
    servers: list[tuple[list[str], list[str]]] = [([], [r for r in asked.rules if r != SCALED])]
    if SCALED in asked.rules:
        servers.append((["--sere-scale"], [SCALED]))
    exact: dict[tuple[int, int], np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("decoding", total=len(asked.batches) * asked.seeds * len(asked.rules))
        for extra, rules in servers:
            with serve(
                asked.model, folder / "server.log", *flags, forcing.SERVER_FLAG, *extra,
                env=IMPORTS_CHECKOUT,
            ) as server:  # fmt: skip
                weigh = Weigher(server, MoeModelInfo.from_folder(str(asked.model)).num_experts)
                for batch, seed in ((b, s) for b in asked.batches for s in range(asked.seeds)):
                    own = _shuffled(len(texts), batch, seed)
                    chosen = [texts[i] for i in own]
                    if (batch, seed) not in exact:
                        weigh.counts_exactly()
                        exact[batch, seed] = forcing.forced_in_batches(server, chosen, batch)
                        plain = weigh.active() / weigh.layers
                    for rule in rules:
                        for settings in _points(rule, plain, weigh.top_k):
                            server.set_sere(**settings, reset_counters=True)
                            seen = forcing.forced_in_batches(server, chosen, batch)
                            about = {"model": asked.model.name, "rule": rule, "batch": batch}
                            kl, costs = _costs(exact[batch, seed], seen, chosen)
                            rows.append(
                                {**about, "seed": seed, "point": server.sere()["operating_point"],
                                 **weigh.shares(), **costs, "_kl": _by_text(kl, own, len(texts))}
                            )  # fmt: skip
                        path = _write(asked.model.name, rows, asked.rules)
                        bar.advance(task)
    _print(_compare(rows, asked.rules), asked.rules)
    print(f"wrote {path}")


def _write(model: str, rows: list[dict[str, Any]], rules: list[str]) -> Path:
    """What there is so far: an end before the end costs only what was not measured."""
    shown = [{key: value for key, value in row.items() if key != "_kl"} for row in rows]
    name = "quality" if model == "demo_model" else f"quality_{model}"
    return write_result(name, shown, model=model, at_equal_bytes=_compare(rows, rules))


def _profile(model: Path, data: Path | None, folder: Path) -> Path:
    """With what `--sere-scale` multiplies by, and surrogates."""
    profile = folder / "sere_profile.safetensors"
    if profile.exists():
        return profile
    own = data or model / "data" / "calibration.txt"
    command = [sys.executable, "-m", "sere_sglang.cli.main", "calibrate", f"--model={model}"]
    command += [f"--out={profile}", "--measure=frobenius", "--measure=residual"]
    command += ["--surrogate-rank=auto", "--tokens=65536"]
    if own.exists():
        command.append(f"--data={own}")
    if profile.with_name(f"{profile.name}.partial").exists():
        command.append("--resume")
    print(f"calibrating: {' '.join(command[2:])}", file=sys.stderr)
    if status := subprocess.run(command, check=False).returncode:
        sys.exit(status)
    return profile


def _points(rule: str, plain: float, top_k: int) -> Iterator[dict[str, Any]]:
    """Live settings, from hard to mild. plain: experts that exact routing loads in a layer."""
    if rule in (FIRST, SCALED, "piggyback"):
        for primary_k in range(1, top_k):
            yield static_settings(primary_k) | {"rule": rule.split(",")[0]}
    elif rule == "budget":
        for share in EXPERTS:
            most = max(1, round(share * plain))
            yield static_settings(1) | {"rule": "budget", "max_experts": most}
    else:
        for loss in LOSSES:
            about = {"quality_budget": loss, "surrogates": rule == AUTO}
            yield static_settings(1) | {"rule": "energy"} | about


def _shuffled(texts: int, batch: int, seed: int) -> list[int]:
    """Whole batches, of every text at least once."""
    own = list(range(texts))
    random.Random(seed).shuffle(own)
    return own + own[: -len(own) % batch]


def _costs(
    exact: np.ndarray, seen: np.ndarray, texts: list[Text]
) -> tuple[np.ndarray, dict[str, float | list[float]]]:
    """Over all sequences and decode steps, in nats per token; KL also by sequence."""
    found = divergence(exact, seen, [text.continuation_ids for text in texts])
    by_sequence = found.kl.mean(1)
    return by_sequence, {
        "kl": float(found.kl.mean()),
        "kl_ci": list(interval(by_sequence, np.mean)),
        "kl_p99": float(np.percentile(found.kl, 99)),
        "delta_nll": float(found.delta_nll.mean()),
        "top1_agreement": float(found.agrees.mean()),
    }


def _by_text(kl: np.ndarray, own: list[int], texts: int) -> np.ndarray:
    """``[texts]``, of each text's last sequence."""
    by_text = np.zeros(texts)
    by_text[own] = kl
    return by_text


def _compare(rows: list[dict[str, Any]], rules: list[str]) -> list[dict[str, Any]]:
    """All batch sizes at equal bytes; points are means over seeds."""
    table = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        curves = {}
        for rule in rules:
            own = [row for row in rows if (row["rule"], row["batch"]) == (rule, batch)]
            points: dict[str, list[dict[str, Any]]] = {}
            for row in own:
                points.setdefault(row["point"]["name"], []).append(row)
            if not own:
                continue
            curves[rule] = Curve(
                np.array([np.mean([r["bytes_share"] for r in p]) for p in points.values()]),
                np.array([np.mean([r["_kl"] for r in p], axis=0) for p in points.values()]),
            )
        if rules[0] in curves:
            table += [{"batch": batch} | row for row in compared(curves, rules[0])]
    return table


def _print(table: list[dict[str, Any]], rules: list[str]) -> None:
    print(f"KL to exact routing, nats per token, and its ratio to {rules[0]}'s at equal bytes")
    print(f"{'batch':>5} {'bytes':>6}  " + "  ".join(f"{rule:>20}" for rule in rules))
    for batch, share in dict.fromkeys((row["batch"], row["share"]) for row in table):
        cells = {r["rule"]: r for r in table if (r["batch"], r["share"]) == (batch, share)}
        shown = [
            f"{c['kl']:.4f} {c['ratio']:.2f} [{c['interval'][0]:.2f},{c['interval'][1]:.2f}]"
            if (c := cells.get(rule)) else "-" for rule in rules
        ]  # fmt: skip
        print(f"{batch:>5} {share:>6.0%}  " + "  ".join(f"{cell:>20}" for cell in shown))
    mean = mean_ratios(table)
    print("   mean ratio  " + "  ".join(f"{mean.get(rule, float('nan')):>20.2f}" for rule in rules))


if __name__ == "__main__":
    main()
