"""``sere-sglang bench``: what re-routing gains on this machine, and what it costs in quality."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sere_sglang.cli.arguments import (
    ApiKey,
    Column,
    Device,
    MeasuredServerArgs,
    ServedModel,
    make_folder,
    numbers,
    routings_of,
)
from sere_sglang.errors import SereError

if TYPE_CHECKING:
    from rich.console import Console

    from sere_sglang.cli.bench_run import Bench, Plan
    from sere_sglang.cli.served import Asked, Served
    from sere_sglang.measure.routing import Routing

_POINTS = "S=1,S=2,S=3,adaptive,auto"


def command(
    model: ServedModel = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Measure the server that runs here instead; its live settings change meanwhile "
            "and are put back. For quality it needs --enable-custom-logit-processor."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="About 5 minutes: fewer streams, rounds, less text.")
    ] = False,
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Streams at once, 1 to 256 (default: 1,4,16,32; 1,8,32 with --quick).",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Turns that every routing takes; fewer than 6 give no 95 % interval."
            " (default: 10; 6 with --quick).",
            show_default=False,
        ),
    ] = None,
    points: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Routings to compare with off: S=2, S=2/0.5 (with rho), adaptive, adaptive@0.05 "
            "(with its budget), auto, auto@0.05, energy=0.05, piggyback=2, topk=2, budget=12 "
            f"(default: {_POINTS}).",
            show_default=False,
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain", help="Also a plain SGLang server beside it; the machine must hold both."
        ),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to decode and to measure quality on, best your own traffic: .txt, .jsonl "
            "or .parquet (default: built-in text, which calibration may have seen).",
            show_default=False,
        ),
    ] = None,
    column: Column = "text",
    out: Annotated[
        Path, typer.Option(help="Folder for bench.json, bench.png and the server's log.")
    ] = Path("out/bench"),
    device: Device = "auto",
    api_key: ApiKey = None,
    server_args: MeasuredServerArgs = None,
) -> None:
    """Measure speed against quality on your machine: worth it, and at which setting?

    Starts one server and switches its routing while it runs: off (exact), SERE
    at S=1, 2, 3, the adaptive policy under SERE's rule, and under rule auto. They
    take turns at the same streams, so that a slow minute hits all of them.

    x off is decode speed over exact routing and, in parentheses, its interval
    over the rounds; where that holds 1 it says "no gain". KL is what quality
    costs: how far the next-token distribution moves, nats per token, along the
    text at the same batch size. The KL of "SERE off" is exact routing against
    itself: noise. Take the fastest line whose KL you accept.

    Ctrl-C keeps what is done. The model needs a profile, made once with
    sere-sglang calibrate --model MODEL.
    """
    from rich.console import Console

    from sere_sglang.cli.bench_run import Plan
    from sere_sglang.cli.chosen_text import check_text
    from sere_sglang.cli.served import Asked

    asked = Asked(model, url, api_key, device, tuple(server_args or ()))
    if plain and url is not None:
        raise SereError("--plain starts a second server; give --model instead of --url")
    if concurrency is None:
        concurrency = "1,8,32" if quick else "1,4,16,32"
    plan = Plan(
        concurrency=numbers(concurrency, "--concurrency"),
        rounds=rounds or (6 if quick else 10),
        seconds=1.0 if quick else 3.0,
        sequences=8 if quick else 32,
    )
    chosen = routings_of(points)
    make_folder(out)
    check_text(text)
    asked.check()
    console = Console(stderr=True)
    _run(asked, plan, chosen, plain, text, column, out, console)


def _run(
    asked: Asked,
    plan: Plan,
    chosen: list[Routing] | None,
    plain: bool,
    text: Path | None,
    column: str,
    out: Path,
    console: Console,
) -> None:
    from sere_sglang.cli.bench_run import Bench, measure
    from sere_sglang.cli.chosen_text import texts_of
    from sere_sglang.cli.counted import counted
    from sere_sglang.cli.literal import literal, say
    from sere_sglang.cli.served import one_line_errors, served

    bench = Bench({"command": asked.command}, out / "bench.json")
    stopped = False
    try:
        with one_line_errors(asked.log(out)), contextlib.ExitStack() as stack:
            with console.status(literal(f"starting the server; its log is {asked.log(out)}")):
                server = stack.enter_context(served(asked, out, max(plan.concurrency), plain=plain))
            routings, left_out = _routings(server, chosen, plain)
            name, texts = texts_of(text, column, server.tokenizer(), max(plan.concurrency))
            bench.about |= server.about | _about(name, plain, left_out, plan)
            for line in _preface(server, name, left_out):
                say(console, line)
            advance = stack.enter_context(counted(console, plan.turns(len(routings))))
            measure(server, routings, texts, plan, bench, advance)
    except KeyboardInterrupt:
        console.print("stopped; the server is " + ("as before" if asked.url else "down"))
        stopped = True
    _report(bench, out, plain)
    if stopped:
        raise typer.Exit(130)


def _routings(
    server: Served, chosen: list[Routing] | None, plain: bool
) -> tuple[list[Routing], dict[str, str]]:
    """With the references; and of the default ones those this server cannot, with the reason."""
    from sere_sglang.measure.routing import OFF, PLAIN

    points, left_out = server.points(chosen, _POINTS.split(","))
    return [*[PLAIN] * plain, OFF.over(server.base), *points], left_out


def _about(name: str, plain: bool, left_out: dict[str, str], plan: Plan) -> dict[str, Any]:
    from sere_sglang.measure.machine import cpu_info, gpu_names

    return {
        "hardware": cpu_info() | {"gpus": gpu_names()},
        "text": name,
        "quality_against": "plain SGLang" if plain else "exact routing on the same server",
        "rounds": plan.rounds,
        "seconds_per_run": plan.seconds,
        "left_out": left_out,
    }


def _preface(server: Served, name: str, left_out: dict[str, str]) -> list[str]:
    lines = [f"up: {server.sere.url}, {server.about['model']}; text: {name}"]
    lines += [f"without {routing}: {reason}" for routing, reason in left_out.items()]
    if server.cannot_force:
        lines.append(f"without KL and active experts: {server.cannot_force}")
    return lines


def _report(bench: Bench, out: Path, plain: bool) -> None:
    from rich.console import Console

    from sere_sglang.cli.bench_table import SURE_ROUNDS, best, bursts, table
    from sere_sglang.cli.drawing import can_draw
    from sere_sglang.cli.literal import say

    rows = bench.rows()
    if not rows:
        return
    bench.write()
    console = Console(width=None if sys.stdout.isatty() else 120)
    fewest = min(row.rounds for row in rows if row.routing != "plain")
    sure = "95 %" if fewest >= SURE_ROUNDS else f"of {fewest} rounds only, too few for 95 %"
    console.print(table(rows, f"{bench.about.get('model')}: x off and KL with intervals ({sure})"))
    for told in (best(rows), bursts(rows)):
        if told is not None:
            console.print(told, highlight=False, soft_wrap=True)
    say(console, f"wrote {bench.path}")
    shown = [row for row in rows if row.kl is not None]
    if not shown:
        return
    if not can_draw():
        console.print(
            "no picture: matplotlib is not here (pip install 'sere-sglang[plot]')", markup=False
        )
        return
    from sere_sglang.cli.speed_plot import draw

    draw(shown, out / "bench.png", "plain SGLang" if plain else "exact routing")
    say(console, f"wrote {out / 'bench.png'}")
