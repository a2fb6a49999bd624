"""``sere-sglang calibrate``: measure how similar a model's experts are; write its profile."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sere_sglang.cli.arguments import Device, ServerArgs, whole_number
from sere_sglang.errors import SereError, cut

if TYPE_CHECKING:
    from sere_sglang.calibration import CalibrationJob
    from sere_sglang.calibration.collection import SurrogateSpec

_MOST_TOKENS = 1 << 40
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def command(
    model: Annotated[str, typer.Option(help="Model folder or hub id, as for sglang serve.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Text: .txt, .jsonl or .parquet; repeatable. Default: built-in text."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Profile to write. Default: where a server looks, sere_profile.safetensors in "
            "the model folder; for a hub id or a read-only folder a cache of this user's."
        ),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            "--measure",
            "--method",
            help="frobenius, cosine, residual, cka, cka-rbf, cka-polynomial or all; repeatable, "
            "the first is what a server uses, the others are kept beside it. Default: frobenius.",
        ),
    ] = None,
    weighting: Annotated[
        str,
        typer.Option(
            help="all: every token counts for every pair, as in the paper; routed: only those "
            "that the router sends to one of the two."
        ),
    ] = "all",
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="Calibration tokens, default 16384; or all or routed, the same as --weighting. "
            "Repeatable.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=8, help="Tokens per sequence.")] = 512,
    column: Annotated[str, typer.Option(help="Text column of .jsonl and .parquet.")] = "text",
    seed: Annotated[int, typer.Option(help="Chooses the sequences.")] = 0,
    memory: Annotated[
        str,
        typer.Option(
            help="Bound on the experts' outputs, and the surrogates' sums, at any time; say 512MiB."
        ),
    ] = "1GiB",
    cka_tokens: Annotated[
        int, typer.Option(min=128, help="Tokens for CKA; cost grows with the square.")
    ] = 2048,
    surrogate_rank: Annotated[
        str | None,
        typer.Option(
            metavar="R|auto",
            help="Also fit a low-rank surrogate of every expert, which stands in for it where it "
            "is not loaded; auto chooses each layer's rank by what it explains on held-out text.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    layer_by_layer: Annotated[
        bool,
        typer.Option(
            "--layer-by-layer",
            help="For a checkpoint larger than the machine: one layer in memory at a time, each "
            "read once, without SGLang. For unquantized models that transformers can build.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted calibration.")
    ] = False,
    if_missing: Annotated[
        bool,
        typer.Option(
            "--if-missing",
            help="Do nothing where --out exists, or without it where a server finds a profile; "
            "continue what was interrupted.",
        ),
    ] = False,
    server_args: ServerArgs = None,
) -> None:
    """Measure how similar the experts of an MoE model are, and write its SERE profile.

    Runs the model over calibration text in SGLang itself, so any model and quantization that
    SGLang serves will do; one too large for this machine runs with --layer-by-layer. Ctrl-C
    keeps what is done; --resume continues.
    """
    from sere_sglang.calibration import check_job, existing_profile, revision_of
    from sere_sglang.cli.calibrate_flow import run

    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # SGLang's imports warn in every process
    warnings.simplefilter("ignore")
    if if_missing:
        revision = revision_of(server_args or ())
        found = existing_profile(model, revision) if out is None else out
        if found is not None and os.path.isfile(found):
            print(f"{found} is there already; nothing to do")
            return
    number, weighting = _tokens(tokens or [], weighting)
    job = _job(
        model=model,
        data=tuple(data or ()),
        out=out,
        measures=tuple(measure or ("frobenius",)),
        weighting=weighting,
        memory=memory,
        cka_tokens=cka_tokens,
        surrogate_rank=surrogate_rank,
        num_tokens=number,
        length=length,
        column=column,
        seed=seed,
        device=device,
        resume=resume,
        layer_by_layer=layer_by_layer,
        server_args=tuple(server_args or ()),
    )
    if if_missing and os.path.exists(job.partial):
        job = dataclasses.replace(job, resume=True)
    check_job(job)
    run(job)


def _job(
    *,
    model: str,
    out: Path | None,
    measures: tuple[str, ...],
    weighting: str,
    memory: str,
    cka_tokens: int,
    surrogate_rank: str | None,
    device: str,
    **rest: Any,
) -> CalibrationJob:
    from sere_sglang.calibration import CalibrationJob, default_out, revision_of
    from sere_sglang.calibration.collection import CollectionSpec

    if device not in ("auto", "cpu", "cuda"):
        raise SereError(f"--device {device}: choose from auto, cpu, cuda")
    spec = CollectionSpec(
        measures=_measures(measures, weighting),
        weighting=weighting,
        memory=_bytes(memory),
        cka_tokens=cka_tokens,
        surrogates=_surrogates(surrogate_rank, rest["length"]),
    )
    if out is None:
        out = default_out(model, revision_of(rest["server_args"]))
    return CalibrationJob(model=model, out=out, spec=spec, device=device, **rest)


def _tokens(asked: list[str], weighting: str) -> tuple[int, str]:
    """How many tokens there are, and which of them count for a pair of experts."""
    from sere_sglang.calibration.measures import WEIGHTINGS

    number = 16384
    for value in asked:
        if value in WEIGHTINGS:
            weighting = value
        elif (given := whole_number(value, _MOST_TOKENS)) is not None:
            number = given
        else:
            raise SereError(
                f"--tokens {cut(value)}: give a number of tokens, or which of them count: "
                f"{' or '.join(WEIGHTINGS)}"
            )
    return number, weighting


def _measures(asked: tuple[str, ...], weighting: str) -> tuple[str, ...]:
    from sere_sglang.calibration.collection import CKA_MEASURES, MEASURES
    from sere_sglang.calibration.measures import MOMENT_MEASURES, WEIGHTINGS

    if weighting not in WEIGHTINGS:
        raise SereError(f"--weighting {weighting}: choose from {', '.join(WEIGHTINGS)}")
    every = MEASURES if weighting == "all" else MOMENT_MEASURES
    names: list[str] = []
    for name in asked:
        names += every if name == "all" else [name]
    for name in names:
        if name not in MEASURES:
            raise SereError(f"--measure {name}: choose from {', '.join(MEASURES)}, all")
        if name in CKA_MEASURES and weighting == "routed":
            raise SereError(
                f"--measure {name} compares whole token sets, --weighting routed has a different "
                "one for each pair; drop one of the two"
            )
    return tuple(dict.fromkeys(names))


def _surrogates(rank: str | None, length: int) -> SurrogateSpec | None:
    from sere_sglang.calibration.collection import SurrogateSpec

    if rank is None:
        return None
    number = whole_number(rank, 1 << 20)
    if rank != "auto" and number is None:
        raise SereError(
            f"--surrogate-rank {cut(rank)}: give a rank from 1 to the model's hidden size, or auto"
        )
    return SurrogateSpec(rank=number, sequence=length)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kmg]?)i?b?", text.strip().lower())
    if match is None:
        raise SereError(f"--memory {cut(text)}: not a size, give for instance 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])
