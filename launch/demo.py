"""The demo: one trained model, served plain and with SERE, measured side by side.

Both servers stay up and take turns, so that a slow minute of the machine hits both. Run it
through ``bash launch/demo.sh``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks._common import hardware_info
from launch import quality
from launch.load import run_load
from launch.local_server import Server, serve

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "demo_model"

console = Console()


@dataclass(frozen=True)
class Point:
    """What one measurement runs at. server: 'plain' or 'sere'; S == top-k means exact routing."""

    server: str
    primary_k: int | None = None
    threshold: float | None = None

    def label(self, top_k: int) -> str:
        if self.primary_k is None:
            return "plain SGLang"
        if self.primary_k >= top_k:
            return "SERE, exact"
        return f"SERE, S={self.primary_k}, rho={self.threshold:g}"


@dataclass
class Row:
    """One line of the table and of demo.json. active_*: mean distinct experts per MoE layer."""

    concurrency: int
    primary_k: int | None
    threshold: float | None
    active_before: float
    active_after: float
    tok_s: float
    ratio: float
    kl: float
    perplexity: float


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    top_k = json.loads((args.model / "config.json").read_text())["num_experts_per_tok"]
    exact = Point("sere", top_k, 0.0)
    points = [Point("plain"), exact]
    points += [Point("sere", s, 0.0) for s in range(1, top_k) if s in args.primary_k]
    points += [Point("sere", min(args.primary_k), rho) for rho in args.threshold]
    texts = _prompts(args.model)
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    flags = [quality.SERVER_FLAG, "--chunked-prefill-size=16384", "--served-model-name=default"]
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, extra in (
            ("plain", []),
            ("sere", ["--moe-backend=sere", f"--sere-profile={args.profile}"]),
        ):
            with console.status(f"starting the {name} server (log: {args.out / f'{name}.log'})"):
                log = args.out / f"{name}.log"
                servers[name] = stack.enter_context(serve(args.model, log, *flags, *extra, env=env))
            console.print(f"[green]up[/] {name} server at {servers[name].url}")
        rows, samples = _measure(servers, points, exact, texts, args)
    _report(rows, points, samples, top_k, args.out)


def _measure(
    servers: dict[str, Server],
    points: list[Point],
    exact: Point,
    texts: list[dict[str, Any]],
    args: argparse.Namespace,
) -> tuple[list[Row], dict[Point, str]]:
    rows: list[Row] = []
    samples: dict[Point, str] = {}
    steps = len(args.concurrency) * len(points) * (args.rounds + 1)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("measuring", total=steps)
        for concurrency in args.concurrency:
            batch = [texts[i % len(texts)] for i in range(concurrency)]
            speeds: dict[Point, list[float]] = {point: [] for point in points}
            for _ in range(args.rounds):
                for point in points:
                    progress.update(task, description=f"speed, {concurrency} streams")
                    _set(servers, point, exact)
                    result = run_load(
                        servers[point.server].url, [t["prompt"] for t in batch], args.tokens
                    )
                    speeds[point].append(result.decode_tok_s)
                    samples[point] = result.text
                    progress.advance(task)
            reference = None
            for point in points:
                progress.update(task, description=f"quality, {concurrency} streams")
                found, active = _quality(servers, point, exact, batch)
                reference = found["log_probs"] if reference is None else reference
                rows.append(
                    Row(
                        concurrency=concurrency,
                        primary_k=point.primary_k,
                        threshold=point.threshold,
                        active_before=active[0],
                        active_after=active[1],
                        tok_s=statistics.median(speeds[point]),
                        ratio=statistics.median(
                            s / p for s, p in zip(speeds[point], speeds[points[0]], strict=True)
                        ),
                        kl=quality.mean_kl(reference, found["log_probs"]),
                        perplexity=found["perplexity"],
                    )
                )
                progress.advance(task)
            # The plain server has no counters; its routing is the exact one, row for row.
            plain, same = rows[-len(points)], rows[-len(points) + 1]
            plain.active_before, plain.active_after = same.active_before, same.active_after
    return rows, samples


def _set(servers: dict[str, Server], point: Point, exact: Point) -> None:
    if point.server == "sere":
        if point == exact:
            servers["sere"].set_sere(enabled=False)
        else:
            servers["sere"].set_sere(
                enabled=True, primary_k=point.primary_k, threshold=point.threshold
            )


def _quality(
    servers: dict[str, Server], point: Point, exact: Point, batch: list[dict[str, Any]]
) -> tuple[dict[str, Any], tuple[float, float]]:
    server = servers[point.server]
    counted = point.server == "sere"
    if counted:
        if point == exact:
            # Counts, and moves nothing but exact twins: a threshold of 1.
            server.set_sere(enabled=True, primary_k=exact.primary_k - 1, threshold=1.0)
        else:
            _set(servers, point, exact)
        server.set_sere(reset_counters=True)
    prompts = [t["prompt_ids"] for t in batch]
    continuations = [t["continuation_ids"] for t in batch]
    log_probs = quality.forced_log_probs(server, prompts, continuations)
    active = _active(server.sere()["counters"]) if counted else (0.0, 0.0)
    return {
        "log_probs": log_probs,
        "perplexity": quality.perplexity(log_probs, continuations),
    }, active


def _active(counters: dict[str, dict[str, int]]) -> tuple[float, float]:
    layers = list(counters.values())
    forwards = sum(layer["forwards"] for layer in layers)
    return (
        sum(layer["active_before"] for layer in layers) / forwards,
        sum(layer["active_after"] for layer in layers) / forwards,
    )


def _prompts(model: Path, prompt_tokens: int = 48, continuation_tokens: int = 33) -> list[Any]:
    """Held-out prompts cut to one length, so that a batch decodes in lockstep."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    texts = []
    for line in (model / "data" / "heldout_prompts.jsonl").read_text().splitlines():
        entry = json.loads(line)
        ids = tokenizer(entry["prompt"] + entry["continuation"], add_special_tokens=False)
        ids = ids["input_ids"]
        if len(ids) < prompt_tokens + continuation_tokens:
            continue
        prompt, rest = ids[:prompt_tokens], ids[prompt_tokens:]
        texts.append(
            {
                "prompt": tokenizer.decode(prompt),
                "prompt_ids": prompt,
                "continuation_ids": rest[:continuation_tokens],
            }
        )
    if not texts:
        sys.exit(f"no held-out prompt of {prompt_tokens + continuation_tokens} tokens in {model}")
    return texts


def _report(
    rows: list[Row], points: list[Point], samples: dict[Point, str], top_k: int, out: Path
) -> None:
    from launch.demo_plot import draw

    table = Table(title="Decoding: plain SGLang against SERE, interleaved, medians")
    for column in ("streams", "routing", "active before", "after", "tok/s", "x plain", "KL", "ppl"):
        table.add_column(column, justify="left" if column == "routing" else "right")
    for i, row in enumerate(rows):
        point = points[i % len(points)]
        table.add_row(
            str(row.concurrency),
            point.label(top_k),
            f"{row.active_before:.1f}",
            f"{row.active_after:.1f}",
            f"{row.tok_s:.0f}",
            f"{row.ratio:.2f}",
            f"{row.kl:.4f}",
            f"{row.perplexity:.2f}",
            end_section=(i + 1) % len(points) == 0,
        )
    console.print(table)
    console.print(
        "active: distinct experts per MoE layer and decode step. KL: nats per token to plain\n"
        "SGLang on held-out text, teacher-forced at the same batch. 'SERE, exact' differs from\n"
        "plain only in the CPU MoE runner: compare SERE rows with it for skipping alone.\n"
    )
    for point in points[:1] + points[2:3]:
        console.print(f"[bold]{point.label(top_k)}[/] writes: {samples[point]!r}\n")
    payload = {"hardware": hardware_info(), "rows": [asdict(row) for row in rows]}
    (out / "demo.json").write_text(json.dumps(payload, indent=2) + "\n")
    draw(rows, points, top_k, out / "demo.png")
    console.print(f"wrote {out / 'demo.json'} and {out / 'demo.png'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="bash launch/demo.sh")
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder")
    parser.add_argument("--profile", type=Path, required=True, help="similarity profile")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="result folder")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[4, 16, 32], help="streams at once"
    )
    parser.add_argument("--primary-k", type=int, nargs="+", default=[1, 2, 3], help="S to try")
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.5], help="rho at least S")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions")
    parser.add_argument("--tokens", type=int, default=64, help="decode steps per stream")
    return parser.parse_args()


if __name__ == "__main__":
    main()
