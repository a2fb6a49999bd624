"""``sere-sglang tune``: the quality budget of every decode batch size, by what it really costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sere_sglang.cli.arguments import (
    ApiKey,
    Column,
    Device,
    MeasuredServerArgs,
    ServedModel,
    WalkedText,
    make_folder,
    numbers,
)
from sere_sglang.errors import SereError, shown
from sere_sglang.names import AUTO, RULES

_KL = 0.02
_MOST_KL, _MOST_SPEEDUP = 10.0, 100.0


def command(
    model: ServedModel = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Use the server that runs here instead; its live settings change meanwhile and "
            "are put back. It needs --enable-custom-logit-processor."
        ),
    ] = None,
    budget_kl: Annotated[
        float | None,
        typer.Option(
            metavar="KL",
            help="The fastest routing whose KL to exact routing is at most this, in nats per token "
            f"(default: {_KL:g}).",
            show_default=False,
        ),
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Instead: the most faithful routing that makes a step so many times as fast as "
            "exact routing, as the server expects it.",
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="Tune for this --sere-rule (default: the server's).",
            show_default=False,
        ),
    ] = None,
    text: WalkedText = None,
    column: Column = "text",
    batch: Annotated[
        str, typer.Option(metavar="N,N,...", help="Decode batch sizes of the table, 1 to 256.")
    ] = "4,8,16,32",
    sequences: Annotated[
        int, typer.Option(min=4, help="Sequences of text, at least, of the last candidates.")
    ] = 64,
    rounds: Annotated[
        int,
        typer.Option(min=0, help="Times that default and tuned are timed at the end; 0: not."),
    ] = 6,
    profile_out: Annotated[
        Path | None,
        typer.Option(
            help="Write the tuned profile here instead of into the profile that is served.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for cells.jsonl, tune.json, tune.html and the log.")
    ] = Path("out/tune"),
    device: Device = "auto",
    api_key: ApiKey = None,
    server_args: MeasuredServerArgs = None,
) -> None:
    """Find what the adaptive policy may spend at each decode batch size.

    --sere-quality-budget is an expectation from the profile. This measures the
    KL of candidate budgets at exactly the batch sizes you name, teacher-forced
    on text as evaluate does, by successive halving: many on little text, the
    best on more. The budgets go into the profile, where the adaptive policy
    finds them the next time a server starts; between two batch sizes it takes
    what lies between. A server without --sere-quality-budget uses them;
    --sere-tuned off, or live {"tuned": false}, goes back.

    What is measured is kept in cells.jsonl: the same command goes on after
    Ctrl-C. tune.html shows speed against KL with the chosen points marked.
    """
    from rich.console import Console

    from sere_sglang.cli.chosen_text import check_text
    from sere_sglang.cli.served import Asked
    from sere_sglang.cli.tune_flow import Tune
    from sere_sglang.measure.halving import Target

    if budget_kl is not None and target_speedup is not None:
        raise SereError("--budget-kl and --target-speedup: aim at one of the two; drop the other")
    if target_speedup is None:
        target = Target(_KL if budget_kl is None else budget_kl, "below")
        if not 0 < target.value <= _MOST_KL:
            raise SereError(f"--budget-kl {target.value:g}: give more than 0, at most {_MOST_KL:g}")
    else:
        target = Target(target_speedup, "above")
        if not 1 < target.value <= _MOST_SPEEDUP:
            raise SereError(
                f"--target-speedup {target.value:g}: give more than 1, at most {_MOST_SPEEDUP:g}"
            )
    if rule is not None and rule not in (*RULES, AUTO):
        raise SereError(f"--rule {shown(rule)}: choose from {', '.join((*RULES, AUTO))}")
    asked = Asked(model, url, api_key, device, tuple(server_args or ()))
    batches = numbers(batch, "--batch")
    make_folder(out)
    check_text(text)
    asked.check()
    tune = Tune(
        asked, target, rule, batches, sequences, rounds, profile_out, out, Console(stderr=True),
    )  # fmt: skip
    tune.run(text, column)
