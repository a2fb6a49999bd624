"""``sere-sglang inspect``: what a profile says about its model."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sere_sglang.cli.literal import literal, say
from sere_sglang.errors import SereError, cut

if TYPE_CHECKING:
    from rich.console import Console

    from sere_sglang.profile import SereProfile


def command(
    profile: Annotated[Path, typer.Argument(help="Profile, or a model folder that has one.")],
    measure: Annotated[
        str | None, typer.Option(help="Of those in the profile. Default: the leading one.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write one page of pictures: .png, .pdf or .svg.")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="Another profile of the same model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show a profile: provenance, layers, critical experts, expected active experts."""
    from rich.console import Console

    from sere_sglang.profile import report
    from sere_sglang.profile.rule_report import rule_reports
    from sere_sglang.profile.surrogate_report import surrogate_reports

    loaded = _load(profile)
    reports = report.layer_reports(loaded, measure)
    facts: dict[str, Any] = {
        "metadata": dataclasses.asdict(loaded.metadata),
        "layers": [r.as_dict() for r in reports],
        "expected_active": report.expected_active_table(loaded),
        "measures": {
            other: report.compare(loaded.similarity, report.matrices_of(loaded, other))
            for other in report.measures_of(loaded)[1:]
        },
        "surrogates": [r.as_dict() for r in surrogate_reports(loaded)],
        "rules": [r.as_dict() for r in rule_reports(loaded)],
    }
    if compare is not None:
        other = report.matrices_of(_load(compare), measure)
        facts["compare"] = report.compare(report.matrices_of(loaded, measure), other)
    if plot is not None:
        _plot(loaded, plot, measure)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    width = Console().width
    console = Console(width=max(width, 120))  # a table that wraps cannot be read
    _print_provenance(console, loaded, profile)
    _print_layers(console, facts["layers"])
    _print_active(console, facts["expected_active"])
    _print_measures(console, facts["measures"], report.measures_of(loaded)[0])
    _print_surrogates(console, facts["surrogates"])
    _print_rules(console, facts["rules"], loaded)
    if compare is not None:
        _print_comparison(console, facts["compare"], compare)
    if plot is not None:
        say(console, f"wrote {plot}")


def _load(path: Path) -> SereProfile:
    from sere_sglang.profile import DEFAULT_FILE_NAME, load_profile

    # Not Path.is_dir, which raises for a name that no file can have.
    return load_profile(path / DEFAULT_FILE_NAME if os.path.isdir(path) else path)


def _plot(profile: SereProfile, path: Path, measure: str | None) -> None:
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise SereError(f"--plot {path}: end the name in .png, .pdf or .svg")
    from sere_sglang.cli.drawing import require_matplotlib
    from sere_sglang.profile.plot import plot_profile

    if profile.num_experts < 2:
        raise SereError(f"--plot {path}: one expert has no pairs to draw; leave --plot out")
    require_matplotlib(f"--plot {path}")
    plot_profile(profile, path, measure)


def _print_provenance(console: Console, profile: SereProfile, path: Path) -> None:
    meta = profile.metadata
    lines = {
        "profile": f"{path} (format {meta.format_version})",
        "model": f"{meta.model} ({meta.architecture})",
        "shape": f"{len(profile.similarity)} MoE layers of {meta.num_layers}, "
        f"{profile.num_experts} experts, top-{meta.top_k}, hidden {meta.hidden_size}",
        "measure": f"{meta.method} {json.dumps(meta.method_parameters)}",
        "data": f"{meta.data}, {meta.num_tokens} tokens",
        "made by": f"sere-sglang {meta.tool_version} on {meta.date}",
        "fingerprints": f"config {meta.fingerprint or '-'}, weights {meta.weights or '-'}",
    }
    tuned = [
        f"{cut(rule)}: " + ", ".join(f"{budget:g} at batch {batch}" for batch, budget in rows)
        for rule, rows in profile.tuning.rows.items()
    ]
    if tuned:
        lines["tuned"] = "; ".join(tuned)
    for name, value in lines.items():
        console.print(literal(f"{name:13}", "bold") + literal(value), soft_wrap=True)


def _print_layers(console: Console, layers: list[dict[str, Any]]) -> None:
    table = _table(
        console,
        "similarity of pairs, and of each expert's best substitute",
        ["layer", "mean", "sd", "min", "median", "max", "best: mean", "min"],
        ["critical experts", "replaceable", "balance", "unused"],
    )
    for row in layers:
        numbers = ("mean", "deviation", "lowest", "median", "highest", "mean_best", "lowest_best")
        table.add_row(
            str(row["layer"]),
            *(f"{row[name]:.3f}" for name in numbers),
            " ".join(map(str, row["critical"])),
            " ".join(map(str, row["replaceable"])),
            "-" if row["balance"] is None else f"{row['balance']:.2f}",
            "-" if row["unused"] is None else str(row["unused"]),
        )
    console.print(table)


def _print_active(console: Console, rows: list[dict[str, float]]) -> None:
    if not rows:
        return
    batches = [name for name in rows[0] if name != "primary_k"]
    table = _table(
        console,
        "expected active experts per layer, by batch (tokens); threshold 0, independent tokens",
        ["S", *batches],
    )
    for row in rows:
        plain = row is rows[-1]
        label = f"{row['primary_k']:.0f} (plain)" if plain else f"{row['primary_k']:.0f}"
        table.add_row(label, *(f"{row[batch]:.1f}" for batch in batches))
    console.print(table)


def _print_measures(
    console: Console, measures: dict[str, list[dict[str, float]]], leading: str
) -> None:
    if not measures:
        return
    table = _table(
        console,
        f"other measures in the profile against {leading}, mean over layers",
        ["measure", "rank correlation", "best substitute differs"],
    )
    for name, rows in measures.items():
        correlation = sum(r["rank_correlation"] for r in rows) / len(rows)
        differs = sum(r["best_substitute_differs"] for r in rows) / len(rows)
        table.add_row(literal(name), f"{correlation:.3f}", f"{differs:.1%}")
    console.print(table)


def _print_surrogates(console: Console, layers: list[dict[str, Any]]) -> None:
    if not layers:
        return
    ranks = sorted({rank for row in layers for rank in row["by_rank"]})
    table = _table(
        console,
        "share of an expert's output explained on held-out tokens: by the best other expert, its "
        "mean, surrogates by rank; and what is stored, with its bytes as a share of the experts'",
        ["layer", "other", "mean", *map(str, ranks), "stored", "explains", "KiB", "bytes"],
        ["fell back"],
    )
    for row in layers:
        table.add_row(
            str(row["layer"]),
            f"{row['best_other']:.3f}",
            f"{row['mean']:.3f}",
            *(f"{row['by_rank'][rank]:.3f}" if rank in row["by_rank"] else "-" for rank in ranks),
            str(row["rank"]),
            f"{row['stored']:.3f}",
            f"{row['bytes'] / 1024:.0f}",
            f"{row['share']:.1%}",
            f"{row['to_mean']} to the mean, {row['to_nothing']} to nothing",
        )
    console.print(table)


def _print_rules(console: Console, layers: list[dict[str, Any]], profile: SereProfile) -> None:
    if not layers:
        return
    from sere_sglang.profile.rule_errors import overall
    from sere_sglang.profile.rule_report import NAMES
    from sere_sglang.schedule.auto_rule import choose_rule

    table = _table(
        console,
        "error of the layer's output on held-out tokens, as a share of its energy, where all "
        "rules load equally many experts; and energy's fill weight, exponent, surrogates' strength",
        ["layer", *NAMES, "a", "gamma", "strength"],
        ["errs least"],
    )
    for row in layers:
        errors = row["errors"]
        weights = (f"{row[name]:g}" for name in ("fill", "renormalize", "compensation"))
        told = (f"{errors[name]:.3g}" if name in errors else "-" for name in NAMES)
        table.add_row(str(row["layer"]), *told, *weights, next(iter(errors)))
    everywhere = {str(c): overall(errors) for c, errors in profile.rule_errors.items()}
    if everywhere:
        told = (f"{everywhere[name]:.3g}" if name in everywhere else "-" for name in NAMES)
        table.add_row("all", *told, "", "", "", next(iter(everywhere)))
    console.print(table)
    console.print(
        f"--sere-rule auto is {choose_rule(profile).name}, where the router exposes its scores"
    )


def _print_comparison(console: Console, rows: list[dict[str, float]], other: Path) -> None:
    table = _table(
        console,
        f"against {other}",
        ["layer", "rank correlation", "best substitute differs", "largest difference"],
    )
    for row in rows:
        table.add_row(
            f"{row['layer']:.0f}",
            f"{row['rank_correlation']:.3f}",
            f"{row['best_substitute_differs']:.1%}",
            f"{row['largest_difference']:.4f}",
        )
    console.print(table)


def _table(console: Console, title: str, numbers: list[str], texts: list[str] | None = None) -> Any:
    from rich.table import Table

    console.print("\n", literal(title, "bold"), sep="")
    table = Table(box=None, pad_edge=False)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in texts or []:
        table.add_column(name, no_wrap=True)
    return table
