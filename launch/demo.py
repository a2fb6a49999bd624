"""The demo: one trained model, served plain and with SERE, measured side by side.

Both servers stay up and take turns, so that a slow minute of the machine hits both. Run it
through ``bash launch/demo.sh``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks._common import hardware_info
from launch import quality
from launch.experiment import (
    PLAIN,
    ROOT,
    Point,
    Row,
    both_servers,
    count_active,
    decode_speeds,
    heldout_prompts,
    set_point,
)
from launch.local_server import Server
from launch.padded_model import write_padded_model

MODEL = ROOT / "demo_model"
FLAGS = ("--chunked-prefill-size=16384", "--served-model-name=default")

console = Console(width=None if sys.stdout.isatty() else 110)


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    top_k = _top_k(args.model)
    points = [PLAIN, Point(top_k, 0.0)]
    points += [Point(s, 0.0) for s in sorted(args.primary_k) if s < top_k]
    points += [Point(min(args.primary_k), rho) for rho in args.threshold]
    texts = heldout_prompts(args.model)
    rows: list[Row] = []
    padded: list[Row] = []
    try:
        with both_servers(
            args.model, args.profile, args.out, *FLAGS, quality.SERVER_FLAG, told=console.print
        ) as servers:
            samples = _measure(servers, points, texts, args, args.concurrency, top_k, rows)
        _print_trained(rows, samples, points, texts, top_k)
        if not args.no_padded:
            _padded(args, points, top_k, padded)
    except KeyboardInterrupt:
        console.print("\nstopped; the servers are down")
        rows = rows[: len(rows) // len(points) * len(points)]
        if not rows:
            sys.exit(130)
    _write(args.out, rows, padded, points, top_k)
    _farewell(args)


def _print_trained(
    rows: list[Row],
    samples: dict[Point, str],
    points: list[Point],
    texts: list[dict[str, Any]],
    top_k: int,
) -> None:
    _print_table("The demo model (trained)", rows, points, top_k)
    console.print(
        "S, rho: --sere-primary-k, --sere-threshold. active, after: distinct experts per MoE\n"
        "layer and decode step, before and after re-routing. x plain: median over interleaved\n"
        "rounds. KL, perplexity: per token of held-out text, teacher-forced in the same batch.\n"
        "'SERE off' routes exactly and differs from plain only in the CPU MoE runner.\n"
    )
    for point in (PLAIN, points[2]):
        console.print(f"[bold]{point.label(top_k)}[/] continues {texts[0]['prompt'][-60:]!r} with")
        console.print(f"  {samples[point]!r}\n", markup=False)


def _measure(
    servers: dict[str, Server],
    points: list[Point],
    texts: list[dict[str, Any]],
    args: argparse.Namespace,
    levels: list[int],
    top_k: int,
    rows: list[Row],
) -> dict[Point, str]:
    samples: dict[Point, str] = {}
    with _progress() as progress:
        total = len(levels) * len(points) * (args.rounds + 1)
        task = progress.add_task("measuring", total=total)
        for concurrency in levels:
            batch = [texts[i % len(texts)] for i in range(concurrency)]
            progress.update(task, description=f"speed, {concurrency} streams")
            speeds = decode_speeds(
                servers,
                points,
                [t["prompt"] for t in batch],
                top_k=top_k,
                rounds=args.rounds,
                tokens=args.tokens,
                advance=lambda: progress.advance(task),
            )
            progress.update(task, description=f"quality, {concurrency} streams")
            reference = None
            for point in points:
                tok_s, ratio, samples[point] = speeds[point]
                found, active = _quality(servers, point, batch, top_k)
                reference = found if reference is None else reference
                rows.append(
                    Row(
                        concurrency,
                        point.primary_k,
                        point.threshold,
                        *active,
                        tok_s,
                        ratio,
                        quality.mean_kl(reference, found),
                        quality.perplexity(found, [t["continuation_ids"] for t in batch]),
                    )
                )
                progress.advance(task)
    return samples


def _quality(
    servers: dict[str, Server], point: Point, batch: list[dict[str, Any]], top_k: int
) -> tuple[Any, tuple[float, float]]:
    """Log-probabilities along the held-out text, and active experts while walking it."""
    prompts = [t["prompt_ids"] for t in batch]
    continuations = [t["continuation_ids"] for t in batch]

    def walk(name: str) -> Any:
        return quality.forced_log_probs(servers[name], prompts, continuations)

    set_point(servers, point, top_k)
    if point.primary_k in (None, top_k):
        found = walk(point.server)
        return found, count_active(servers, point, top_k, lambda: walk("sere"))
    kept: list[Any] = []
    active = count_active(servers, point, top_k, lambda: kept.append(walk("sere")))
    return kept[0], active


def _padded(args: argparse.Namespace, points: list[Point], top_k: int, rows: list[Row]) -> None:
    """The same with experts of a real model's size, at the least and the most streams."""
    console.rule()
    with console.status("writing the demo model with its experts padded to a real model's size"):
        model, profile = write_padded_model(args.out / "padded_model", args.model, args.profile)
    logs = args.out / "padded"
    logs.mkdir(exist_ok=True)
    flags = (*FLAGS, quality.SERVER_FLAG)
    levels = sorted({min(args.concurrency), max(args.concurrency)})
    with both_servers(model, profile, logs, *flags, told=console.print) as servers:
        _measure(servers, points, heldout_prompts(args.model), args, levels, top_k, rows)
    _print_table("The same model, experts padded to 3 MB each", rows, points, top_k)


def _print_table(title: str, rows: list[Row], points: list[Point], top_k: int) -> None:
    table = Table(title=title)
    for column in ("streams", "routing", "active", "after", "tok/s", "x plain", "KL", "perplexity"):
        table.add_column(column, justify="left" if column == "routing" else "right")
    for i, row in enumerate(rows):
        table.add_row(
            str(row.concurrency),
            points[i % len(points)].label(top_k),
            f"{row.active_before:.1f}",
            f"{row.active_after:.1f}",
            f"{row.tok_s:.0f}",
            f"{row.ratio:.2f}",
            "" if row.kl is None else f"{row.kl:.4f}",
            "" if row.perplexity is None else f"{row.perplexity:.2f}",
            end_section=(i + 1) % len(points) == 0,
        )
    console.print(table)


def _write(out: Path, rows: list[Row], padded: list[Row], points: list[Point], top_k: int) -> None:
    from launch.demo_plot import draw

    payload = {
        "hardware": hardware_info(),
        "rows": [asdict(row) for row in rows],
        "padded_rows": [asdict(row) for row in padded],
    }
    (out / "demo.json").write_text(json.dumps(payload, indent=2) + "\n")
    draw(rows, padded, points, top_k, out / "demo.png")
    console.print(f"wrote {out / 'demo.json'} and {out / 'demo.png'}\n")


def _farewell(args: argparse.Namespace) -> None:
    def short(path: Path) -> str:
        path = path.resolve()
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)

    python = Path(sys.executable)
    sglang = python.with_name("sglang")
    console.print("[bold]Keep a server running:[/]")
    command = (
        f"  SGLANG_USE_CPU_ENGINE=1 {short(sglang) if sglang.is_relative_to(ROOT) else sglang} "
        f"serve --model-path {short(args.model)} --device cpu --attention-backend torch_native "
        f"--disable-radix-cache --port 30000 --moe-backend sere "
        f"--sere-profile {short(args.profile)} --sere-primary-k {max(args.primary_k)}"
    )
    curl = (
        "  curl http://127.0.0.1:30000/v1/completions -H 'Content-Type: application/json' -d "
        '\'{"model": "default", "prompt": "In the beginning", "max_tokens": 40}\''
    )
    console.print(command, soft_wrap=True, markup=False, highlight=False)
    console.print("[bold]and ask it:[/]")
    console.print(curl, soft_wrap=True, markup=False, highlight=False)


def _top_k(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["num_experts_per_tok"])


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="bash launch/demo.sh")
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder")
    parser.add_argument("--profile", type=Path, required=True, help="similarity profile")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="result folder")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[4, 16, 32], help="streams at once"
    )
    parser.add_argument("--primary-k", type=int, nargs="+", default=[1, 2, 3], help="S to try")
    parser.add_argument(
        "--threshold", type=float, nargs="+", default=[0.3], help="rho to try at the lowest S"
    )
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps per stream")
    parser.add_argument(
        "--no-padded", action="store_true", help="leave out the model with padded experts"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
