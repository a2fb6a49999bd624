"""What each way to re-route costs in quality, at the experts it loads.

    python -m benchmarks.quality                     the demo model, about ten minutes
    python -m benchmarks.quality --model FOLDER      yours, beside its data/heldout_prompts.jsonl

Held-out text, teacher-forced, in batches of one size; the reference is the same server with SERE
switched off, in the same batches. Intervals are bootstrapped over sequences. Writes
``quality.json``.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks._common import write_result
from benchmarks.serving import quality
from benchmarks.serving.experiment import heldout_prompts, interval, static_settings
from benchmarks.serving.server import IMPORTS_CHECKOUT, Server, serve
from sere_sglang.profile import MoeModelInfo

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (4, 8, 16, 32, 64)
# Its name and what makes a server do it.
RULES = {"similarity": [], "similarity, scaled": ["--sere-scale"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "demo_model", help="model folder")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "quality", help="for logs")
    parser.add_argument("--seeds", type=int, default=3, help="ways to put sequences together")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="decode batches")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    profile = folder / "sere_profile.safetensors"
    if not profile.exists():
        print("calibrating, with what --sere-scale multiplies by ...", file=sys.stderr)
        command = [sys.executable, "-m", "sere_sglang.cli.main", "calibrate", "--resume"]
        command += [f"--model={asked.model}", f"--out={profile}"]
        command += ["--measure=frobenius", "--measure=residual"]
        if not profile.with_name(f"{profile.name}.partial").exists():
            command.remove("--resume")
        if status := subprocess.run(command, check=False).returncode:
            sys.exit(status)
    texts = heldout_prompts(asked.model)
    points = range(1, MoeModelInfo.from_folder(asked.model).top_k)
    flags = ["--moe-backend=sere", f"--sere-profile={profile}", "--chunked-prefill-size=16384"]
    exact: dict[tuple[int, int], np.ndarray] = {}
    rows = []
    total = len(RULES) * len(asked.batches) * asked.seeds * len(points)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("decoding", total=total)
        for rule, extra in RULES.items():
            log = folder / "server.log"
            with serve(
                asked.model, log, *flags, quality.SERVER_FLAG, *extra, env=IMPORTS_CHECKOUT
            ) as server:
                for batch, seed in ((b, s) for b in asked.batches for s in range(asked.seeds)):
                    own = _shuffled(texts, batch, seed)
                    if (batch, seed) not in exact:
                        server.set_sere(enabled=False)
                        exact[batch, seed] = quality.forced_in_batches(server, own, batch)
                    for primary_k in points:
                        server.set_sere(**static_settings(primary_k), reset_counters=True)
                        seen = quality.forced_in_batches(server, own, batch)
                        rows.append(
                            {
                                "model": asked.model.name,
                                "rule": rule,
                                "primary_k": primary_k,
                                "batch": batch,
                                "seed": seed,
                                **_shares(server),
                                **_costs(exact[batch, seed], seen, own),
                            }
                        )
                        bar.advance(task)
    _print(rows)
    print(f"wrote {write_result('quality', rows, model=asked.model.name)}")


def _shuffled(texts: list[dict[str, Any]], batch: int, seed: int) -> list[dict[str, Any]]:
    """Whole batches, of every text at least once."""
    own = list(texts)
    random.Random(seed).shuffle(own)
    return own + own[: -len(own) % batch]


def _shares(server: Server) -> dict[str, float]:
    """Experts loaded, of those that exact routing would load; they are all that is loaded."""
    layers = server.sere()["counters"].values()
    after, before = (sum(row[key] for row in layers) for key in ("active_after", "active_before"))
    return {"active_share": after / before, "bytes_share": after / before}


def _costs(
    exact: np.ndarray, seen: np.ndarray, texts: list[dict[str, Any]]
) -> dict[str, float | list[float]]:
    """Over all sequences and decode steps, in nats per token."""
    p, q = (x[:, 1:].astype(np.float64) for x in (exact, seen))
    kl = (np.exp(p) * (p - q)).sum(-1)  # [sequences, steps]
    forced = np.asarray([text["continuation_ids"] for text in texts])[:, 1:, None]
    nll = -np.take_along_axis(q, forced, -1) + np.take_along_axis(p, forced, -1)
    return {
        "kl": float(kl.mean()),
        "kl_ci": list(interval(kl.mean(1), np.mean)),
        "kl_p99": float(np.percentile(kl, 99)),
        "delta_nll": float(nll.mean()),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).mean()),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    """The mean over seeds; the last column is against the first rule at the same point."""
    first_rule = next(iter(RULES))
    print(f"{'rule':<20} batch  S  loaded      KL     p99  d NLL  top-1  of {first_rule}'s KL")
    for rule in RULES:
        for batch in dict.fromkeys(row["batch"] for row in rows):
            for primary_k in dict.fromkeys(row["primary_k"] for row in rows):
                own, first = (
                    [
                        row
                        for row in rows
                        if (row["rule"], row["batch"], row["primary_k"]) == (name, batch, primary_k)
                    ]
                    for name in (rule, first_rule)
                )
                mean = {
                    key: float(np.mean([row[key] for row in own]))
                    for key in ("active_share", "kl", "kl_p99", "delta_nll", "top1_agreement")
                }
                ratio = mean["kl"] / np.mean([row["kl"] for row in first])
                print(
                    f"{rule:<20} {batch:>5} {primary_k:>2} {mean['active_share']:>6.0%} "
                    f"{mean['kl']:>8.4f} {mean['kl_p99']:>7.3f} {mean['delta_nll']:>+6.3f} "
                    f"{mean['top1_agreement']:>6.1%} {ratio:>8.2f}"
                )


if __name__ == "__main__":
    main()
