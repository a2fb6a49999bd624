"""The demo: one trained model, served plain and with SERE, measured side by side.

The model's experts are padded to a size at which reading them decides a step's time, as in real
models (serving.padded_model). Two servers stay up and take turns, so that a slow minute of the
machine hits both. Run it through ``bash launch/demo.sh``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks._common import hardware_info
from benchmarks.serving.experiment import ROOT, both_servers, heldout_prompts
from benchmarks.serving.floor_model import FloorModel
from benchmarks.serving.padded_model import write_padded_model
from sere_sglang.measure.divergence import mean_kl, perplexity
from sere_sglang.measure.forcing import SERVER_FLAG
from sere_sglang.measure.routing import ADAPTIVE, AUTO, OFF, PLAIN, Routing, static
from sere_sglang.measure.server import Server
from sere_sglang.measure.texts import Text, as_many
from sere_sglang.measure.turns import Active, Speed, decode_speeds, walk
from sere_sglang.profile import load_profile
from sere_sglang.schedule.cost_file import described
from sere_sglang.schedule.expectation import expect, statistics_of

MODEL = ROOT / "demo_model"
FLAGS = ("--chunked-prefill-size=16384", "--served-model-name=default", SERVER_FLAG)

console = Console(width=None if sys.stdout.isatty() else 110)


@dataclass
class Row:
    """One line of the table and of demo.json.

    active_*: mean distinct experts per MoE layer and decode step, before and after re-routing.
    over_off_interval: of the median over rounds, 95 %. limit: what `FloorModel.limit` allows over
    off; moe_share: the MoE layers' part of a step with exact routing. kl: nats per token to plain
    SGLang over held-out text, teacher-forced in the same batch; perplexity over the same text.
    """

    streams: int
    routing: str
    active_before: float
    active_after: float
    tok_s: float
    over_plain: float
    over_off: float
    over_off_interval: tuple[float, float]
    limit: float
    moe_share: float
    kl: float
    perplexity: float


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    with console.status("writing the demo model with experts of a real model's size"):
        model, profile = write_padded_model(args.out / "padded_model", args.model, args.profile)
    config = json.loads((model / "config.json").read_text())
    floor = FloorModel.of(config, hardware_info())
    expectation = expect(statistics_of(load_profile(profile)))
    console.print(floor.told(expectation, args.streams), highlight=False)
    routings = [PLAIN, OFF, *(static(s) for s in sorted(args.primary_k)), ADAPTIVE, AUTO]
    texts = heldout_prompts(args.model)
    rows: list[Row] = []
    samples: dict[Routing, str] = {}
    try:
        with both_servers(model, profile, args.out, *FLAGS, told=console.print) as servers:
            samples = _measure(servers, routings, texts, args, floor, rows)
    except KeyboardInterrupt:
        console.print("\nstopped; the servers are down")
        if not rows:
            sys.exit(130)
    _print_table(rows, len(routings))
    if samples:
        for routing in (PLAIN, ADAPTIVE, AUTO):
            console.print(f"[bold]{routing.name}[/] continues {texts[0].prompt[-60:]!r} with")
            console.print(f"  {samples[routing]!r}\n", markup=False)
    _write(args.out, rows)
    _farewell(args)


def _measure(
    servers: dict[str, Server],
    routings: list[Routing],
    texts: list[Text],
    args: argparse.Namespace,
    floor: FloorModel,
    rows: list[Row],
) -> dict[Routing, str]:
    """Appends each level's rows once they are complete; returns what the first stream wrote."""
    with _progress() as progress:
        total = len(args.streams) * len(routings) * (args.rounds + 2)
        task = progress.add_task("measuring", total=total)
        for streams in args.streams:
            batch = as_many(texts, streams)
            progress.update(task, description=f"speed, {streams} streams")
            speeds = decode_speeds(
                servers,
                routings,
                [t.prompt_ids for t in batch],
                rounds=args.rounds,
                tokens=args.tokens,
                advance=lambda: progress.advance(task),
                seconds=60 * args.minutes / len(args.streams),
            )
            progress.update(task, description=f"quality, {streams} streams")
            found = {}
            for routing in routings:
                walked, active = walk(servers, routing, batch, streams)
                found[routing] = walked[0], active
                progress.advance(task)
            rows += _rows(servers["sere"], speeds, found, batch, floor)
    return {routing: speed.text for routing, speed in speeds.items()}


def _rows(
    sere: Server,
    speeds: dict[Routing, Speed],
    found: dict[Routing, tuple[Any, Active]],
    batch: list[Text],
    floor: FloorModel,
) -> list[Row]:
    streams = len(batch)
    reference, (active_off, _, _) = found[PLAIN]
    step_ms = 1000 * streams / speeds[OFF].median
    moe_ms = _moe_ms(sere, streams, active_off)
    rows = []
    for routing, speed in speeds.items():
        log_probs, (before, after, _) = found[routing]
        over_off, interval = speed.over(speeds[OFF])
        rows.append(
            Row(
                streams=streams,
                routing=routing.name,
                active_before=before,
                active_after=after,
                tok_s=speed.median,
                over_plain=speed.over(speeds[PLAIN])[0],
                over_off=over_off,
                over_off_interval=interval,
                limit=floor.limit(streams, active_off, after, step_ms, moe_ms),
                moe_share=min(moe_ms / step_ms, 1.0),
                kl=mean_kl(reference, log_probs),
                perplexity=perplexity(log_probs, [t.continuation_ids for t in batch]),
            )
        )
    return rows


def _moe_ms(sere: Server, streams: int, active: float) -> float:
    """Of the MoE layers of a step, as the server timed them at its start."""
    cost = described(sere.get("/server_info")["sere"]["cost"])
    return float(cost.moe_ms(streams, active * cost.num_layers))


def _print_table(rows: list[Row], per_level: int) -> None:
    table = Table(title="The demo model, experts padded to a real model's size")
    for column in (
        "streams", "routing", "active", "after", "tok/s", "x off", "95 %", "limit", "KL",
        "perplexity",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "routing" else "right")
    for i, row in enumerate(rows):
        low, high = row.over_off_interval
        compared = row.routing not in (PLAIN.name, OFF.name)
        table.add_row(
            str(row.streams),
            {"plain": "plain SGLang", "off": "SERE off"}.get(row.routing, row.routing),
            f"{row.active_before:.1f}",
            f"{row.active_after:.1f}",
            f"{row.tok_s:.0f}",
            f"{row.over_off:.2f}",
            f"{low:.2f}-{high:.2f}" + (" no gain" if compared and low <= 1.0 else ""),
            f"{row.limit:.2f}" if compared else "",
            f"{row.kl:.4f}",
            f"{row.perplexity:.2f}",
            end_section=(i + 1) % per_level == 0,
        )
    console.print(table)
    shares = {row.streams: row.moe_share for row in rows}
    told = ", ".join(f"{share:.0%} of a step at {n} streams" for n, share in shares.items())
    console.print(
        "SERE off routes exactly, on our CPU kernels: it is the baseline of re-routing. x off:\n"
        "median over interleaved rounds, and its interval. limit: what x off would be if the\n"
        f"MoE layers, {told},\n"
        "as timed alone at start, shrank as their bytes and operations do; where the server's\n"
        "other processes slow them down, a gain can be greater. S=1, 2, 3: the published method.\n"
        "adaptive: its rule under the adaptive policy; auto: rule auto under it, the default. KL\n"
        "(to plain) and perplexity: per token of held-out text.\n"
    )


def _write(out: Path, rows: list[Row]) -> None:
    from sere_sglang.cli.speed_plot import draw

    payload = {"hardware": hardware_info(), "rows": [asdict(row) for row in rows]}
    (out / "demo.json").write_text(json.dumps(payload, indent=2) + "\n")
    draw(rows, out / "demo.png")
    console.print(f"wrote {out / 'demo.json'} and {out / 'demo.png'}\n")


def _farewell(args: argparse.Namespace) -> None:
    def short(path: Path) -> str:
        path = path.resolve()
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)

    sglang = Path(sys.executable).with_name("sglang")
    console.print("[bold]Keep a server running:[/]")
    command = (
        f"  SGLANG_USE_CPU_ENGINE=1 {short(sglang) if sglang.is_relative_to(ROOT) else sglang} "
        f"serve --model-path {short(args.model)} --device cpu --attention-backend torch_native "
        "--disable-radix-cache --max-total-tokens 16384 --port 30000 --moe-backend sere"
    )
    curl = (
        "  curl http://127.0.0.1:30000/v1/completions -H 'Content-Type: application/json' -d "
        '\'{"model": "default", "prompt": "In the beginning", "max_tokens": 40}\''
    )
    console.print(command, soft_wrap=True, markup=False, highlight=False)
    console.print("[bold]and ask it:[/]")
    console.print(curl, soft_wrap=True, markup=False, highlight=False)


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
    parser.add_argument("--profile", type=Path, help="similarity profile (default: the model's)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="result folder")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[4, 16, 32], help="requests at once"
    )
    parser.add_argument("--primary-k", type=int, nargs="+", default=[1, 2, 3], help="S to try")
    parser.add_argument("--rounds", type=int, default=6, help="interleaved repetitions at most")
    parser.add_argument(
        "--minutes", type=float, default=3.5, help="for rounds after the fourth, on a slow machine"
    )
    parser.add_argument("--tokens", type=int, default=32, help="decode steps per stream")
    args = parser.parse_args()
    args.profile = args.profile or args.model / "sere_profile.safetensors"
    return args


if __name__ == "__main__":
    main()
