"""``sere-sglang simulate``: what each policy would make of a trace or of synthetic traffic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sere_sglang.cli.arguments import make_folder, positive
from sere_sglang.errors import SereError
from sere_sglang.files import write_output
from sere_sglang.names import AUTO, SIMILARITY
from sere_sglang.options import OPTIONS

if TYPE_CHECKING:
    from sere_sglang.schedule.auto_rule import RuleChoice
    from sere_sglang.schedule.settings import Settings
    from sere_sglang.schedule.simulate import Run

_BUDGET, _MIN_GAIN, _SLO, _RULE = (
    OPTIONS[f"sere_{name}"] for name in ("quality_budget", "min_gain", "tpot_slo_ms", "rule")
)


def command(
    profile: Annotated[Path, typer.Option(help="Profile of the model, with its popularity.")],
    cost: Annotated[
        Path,
        typer.Option(
            help="What the model's layers cost, written by sere-sglang doctor --model MODEL "
            "--out FILE on the machine that serves.",
            metavar="FILE",
        ),
    ],
    trace: Annotated[
        Path | None, typer.Option(help="Replay this file, written by a server's --sere-trace.")
    ] = None,
    rate: Annotated[
        float, typer.Option(callback=positive, help="Without --trace: requests per second.")
    ] = 2.0,
    peak: Annotated[
        float, typer.Option(callback=positive, help="... at the height of the swing.")
    ] = 20.0,
    period: Annotated[
        float, typer.Option(callback=positive, help="... which takes this many seconds.")
    ] = 60.0,
    tokens: Annotated[
        float,
        typer.Option(callback=positive, min=1.0, help="... mean tokens that a request decodes."),
    ] = 200.0,
    max_running: Annotated[
        int, typer.Option(min=1, max=65536, help="... most requests in a batch.")
    ] = 256,
    steps: Annotated[int, typer.Option(min=1, help="... decode steps to simulate.")] = 20_000,
    fixed_ms: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Part of a step that is not its experts, milliseconds.  [default: of the cost "
            "file's step, else 0: gains are then what they are of the experts alone]",
            show_default=False,
        ),
    ] = None,
    row_us: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="... and that grows with each row, microseconds.  [default: as --fixed-ms]",
            show_default=False,
        ),
    ] = None,
    quality_budget: Annotated[float, typer.Option(help=_BUDGET.help)] = _BUDGET.default,
    min_gain: Annotated[float, typer.Option(help=_MIN_GAIN.help)] = _MIN_GAIN.default,
    tpot_slo_ms: Annotated[
        float | None, typer.Option(help=f"Simulate slo too. {_SLO.help}", show_default=False)
    ] = None,
    primary_k: Annotated[
        list[int] | None, typer.Option(help="S of static policies to compare; repeat it.")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help=f"{_RULE.help}  [default: auto; similarity with --primary-k]",
            metavar=f"[{'|'.join(_RULE.names)}]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the synthetic traffic and the noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for simulate.json and simulate.png.")] = Path(
        "out/simulate"
    ),
) -> None:
    """Compare policies before touching production: exact, static, adaptive, slo.

    Every policy meets the same arrivals. Steps take what the cost model says of the experts that
    the profile's popularity makes a batch of that size activate. Nothing is served.
    """
    from sere_sglang.cli.drawing import can_draw
    from sere_sglang.profile import load_profile
    from sere_sglang.schedule.auto_rule import choose_rule
    from sere_sglang.schedule.cost import StepModel
    from sere_sglang.schedule.cost_file import CostModel, check_cost_fits, load_cost
    from sere_sglang.schedule.expectation import expect, statistics_of
    from sere_sglang.schedule.simulate import Simulator, Traffic
    from sere_sglang.schedule.trace import read_trace

    loaded = load_profile(profile)
    file = load_cost(cost, "--cost")
    check_cost_fits(file, CostModel.of_profile(loaded), cost, "--cost")
    expectation = expect(statistics_of(loaded))
    compositions = [s.composition for s in read_trace(trace)] if trace is not None else []
    auto = choose_rule(loaded)
    rule = rule or (SIMILARITY if primary_k else AUTO)
    if rule == AUTO:
        print(f"auto is {auto}")
    policies = _policies(
        expectation.top_k, rule, auto, primary_k, quality_budget, min_gain, tpot_slo_ms
    )
    if trace is not None and not any(c.is_decode_like for c in compositions):
        raise SereError(f"--trace {trace}: holds no decode step")
    make_folder(out)
    costs = file.cost
    step = costs.step or StepModel()
    step = dataclasses.replace(
        step,
        fixed_ms=step.fixed_ms if fixed_ms is None else fixed_ms,
        row_ms=step.row_ms if row_us is None else row_us / 1000,
    )
    if costs.step is not None:
        costs = dataclasses.replace(costs, step=step)
    simulator = Simulator(expectation, costs, step, tuning=loaded.tuning, noise=0.02, seed=seed)
    traffic = Traffic(rate, peak, period, tokens, max_running, prefill_ms=2.0, seed=seed)
    runs: list[Run] = []
    for name, settings in policies.items():
        total = len(compositions) or steps
        with _progress(name, total) as told:
            if compositions:
                runs.append(simulator.replay(name, settings, compositions, told))
            else:
                runs.append(simulator.serve(name, settings, traffic, steps, told))
    _print(runs)
    rows = [run.summary() for run in runs]
    write_output(out / "simulate.json", json.dumps({"rows": rows}, indent=1) + "\n")
    print(f"wrote {out / 'simulate.json'}")
    if can_draw():
        from sere_sglang.cli.simulation_plot import draw

        draw(runs, out / "simulate.png")
        print(f"wrote {out / 'simulate.png'}")
    else:
        print("no picture: matplotlib is not here (pip install 'sere-sglang[plot]')")


def _policies(
    top_k: int,
    rule: str,
    auto: RuleChoice,
    primary_k: list[int] | None,
    quality_budget: float,
    min_gain: float,
    tpot_slo_ms: float | None,
) -> dict[str, Settings]:
    from sere_sglang.config import live_settings
    from sere_sglang.config_check import resolved
    from sere_sglang.options import SereConfig
    from sere_sglang.schedule.settings import Limits

    given = {_RULE: rule, _BUDGET: quality_budget, _MIN_GAIN: min_gain, _SLO: tpot_slo_ms}
    for option, value in given.items():
        reason = None if value is None else option.fault(value)
        if reason is not None:
            raise SereError(f"--{option.setting.replace('_', '-')} {value}: {reason}")
    words: dict[str, Any] = {option.name: value for option, value in given.items()}
    if rule == AUTO:
        words[_RULE.name] = auto.rule
    asked = SereConfig(moe_backend="sere", **words)
    for s in primary_k or ():
        if not 1 <= s < top_k:
            raise SereError(f"--primary-k {s}: give S from 1 to {top_k - 1}")
    if primary_k and asked.rule not in OPTIONS["sere_primary_k"].rules:
        raise SereError(f"--primary-k: rule {asked.rule} has no S; drop one of the two")
    rule = asked.rule
    # Of `budget`, which is not among the static ones, a number of experts that is not looked at.
    base = dataclasses.replace(
        live_settings(resolved(asked, top_k=top_k)), policy="static", min_batch=1, max_experts=1
    )

    def one(**changes: Any) -> Settings:
        return base.updated(changes, Limits(top_k, auto))

    policies = {"exact": one(enabled=False)}
    if rule == "energy":
        policies["static"] = one()
    elif rule != "budget":
        chosen = primary_k or sorted({1, 2, max(1, top_k // 2)} & set(range(1, top_k)))
        policies |= {f"static S={s}": one(primary_k=s) for s in chosen}
    live = {"adaptive": "adaptive"}
    if tpot_slo_ms is not None:
        live["slo"] = f"slo {tpot_slo_ms:g} ms"
    for policy, name in live.items():
        least = OPTIONS["sere_min_batch"].default_of(SereConfig(sere_policy=policy), top_k)
        policies[name] = one(policy=policy, min_batch=least)
    return policies


@contextmanager
def _progress(name: str, total: int) -> Iterator[Any]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:14}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.update(task, completed=done)


def _print(runs: list[Run]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="the same arrivals, per policy")
    heads = ("policy", "rows", "active", "re-routed", "tok/s", "TPOT p50", "p99 ms", "loss")
    for head in heads:
        table.add_column(head, justify="left" if head == "policy" else "right")
    for run in runs:
        row = run.summary()
        table.add_row(
            run.name,
            f"{row['rows']:.1f}",
            f"{row['active']:.1f}",
            f"{row['rerouted_steps']:.0%}",
            f"{row['tok_s']:.0f}",
            f"{row['tpot_p50_ms']:.2f}",
            f"{row['tpot_p99_ms']:.2f}",
            f"{row['loss']:.4f}",
        )
    Console().print(table)
