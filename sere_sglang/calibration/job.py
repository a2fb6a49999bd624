"""What a calibration is asked to do, and everything that can be refused before a model loads."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sere_sglang.calibration.collection import (
    CollectionSpec,
    check_enough,
    load_partial,
    unusable_partial,
    writing,
)
from sere_sglang.calibration.surrogate_fit import evaluated_ranks
from sere_sglang.calibration.text import CalibrationText, check_files, read_windows
from sere_sglang.cpu import isa as cpu_isa
from sere_sglang.cpu.large_pages import ask_allocator_for_large_pages
from sere_sglang.errors import PATH_SHOWN, SereError, cut
from sere_sglang.files import can_write_in, is_no_regular_file, one_writer
from sere_sglang.profile import MoeModelInfo, ProfileError, default_place, find_profile
from sere_sglang.profile.model_files import downloaded, model_folder, weights_fingerprint

SAVE_EVERY_S = 30.0


def seconds_between_saves(at_least: float, last_took: float) -> float:
    """At most a twentieth of the time goes into saving what takes long; a second is nothing."""
    return max(at_least, 20 * (last_took - 1))


@dataclass(frozen=True)
class CalibrationJob:
    """What the command line asks for. server_args: further flags of SGLang, as on its own."""

    model: str
    out: Path
    spec: CollectionSpec
    data: tuple[Path, ...] = ()
    column: str = "text"
    num_tokens: int = 16384
    length: int = 512
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    layer_by_layer: bool = False
    server_args: tuple[str, ...] = ()

    @property
    def revision(self) -> str | None:
        """Of a hub model, as SGLang's own flag says."""
        return revision_of(self.server_args)

    @cached_property  # it reads every weight file
    def weights(self) -> str:
        return weights_fingerprint(model_folder(self.model, self.revision))

    @property
    def partial(self) -> Path:
        return self.out.parent / f"{self.out.name}.partial"

    @property
    def hidden_files(self) -> tuple[Path, Path]:
        """Where a layer-by-layer calibration keeps what goes into a layer and what comes out."""
        name = self.partial.name
        return self.out.parent / f"{name}.hidden0", self.out.parent / f"{name}.hidden1"


def revision_of(server_args: Sequence[str]) -> str | None:
    """The value of ``--revision`` among SGLang's flags."""
    return flag_value(server_args, "--revision")


def flag_value(server_args: Sequence[str], flag: str) -> str | None:
    """What `flag` is given as, in one word or two; None where it is not."""
    for at, argument in enumerate(server_args):
        name, given, value = argument.partition("=")
        if name == flag:
            return value if given else "".join(server_args[at + 1 : at + 2]) or None
    return None


def default_out(model: str, revision: str | None) -> Path:
    """Where a server will look for this model's profile; a hub model is downloaded first.

    Raises `SereError`.
    """
    return default_place(_whole_model(model, revision))


def existing_profile(model: str, revision: str | None) -> Path | None:
    """The profile that a server would find; a hub model is downloaded first. Raises `SereError`."""
    info = _whole_model(model, revision)
    try:
        return find_profile(info)
    except ProfileError:
        return None


def _whole_model(model: str, revision: str | None) -> MoeModelInfo:
    info = about_model(lambda: MoeModelInfo.from_folder(downloaded(model, revision)))
    return dataclasses.replace(info, name=model, revision=revision)


class Interrupted(Exception):
    """Ctrl-C; everything collected is in the partial file."""


Progress = Callable[[int, int, str], None]
"""Called with (tokens done, tokens in all, what is being done)."""


def check_job(job: CalibrationJob) -> None:
    """Everything that can be refused before SGLang is even imported. Raises `SereError`."""
    _check_device(job.device)
    if job.layer_by_layer and job.server_args:
        raise SereError(
            f"--layer-by-layer runs without SGLang, which '-- {' '.join(job.server_args)}' is "
            "for; drop one of the two"
        )
    if job.layer_by_layer and not os.path.isdir(job.model):
        raise SereError(
            f"--layer-by-layer reads a model folder, --model {job.model} is none; download it first"
        )
    check_files(job.data)
    _check_out(job.out)
    if not job.resume and job.partial.exists():
        with one_writer(job.out):  # which refuses where it is not finished, but under way
            raise SereError(
                f"{job.partial} holds an unfinished calibration; continue it with --resume or "
                "delete it"
            )
    if os.path.isdir(job.model):
        model = about_model(lambda: MoeModelInfo.from_folder(job.model))
        if job.spec.surrogates is not None and model.hidden_size:
            shape = model.num_experts, model.hidden_size, len(model.layer_ids)
            evaluated_ranks(job.spec.surrogates, *shape)


def prepare_device(device: str) -> str:
    """Resolve ``auto``; on a CPU, ask SGLang for its CPU engine before SGLang is imported.

    Raises `SereError` where ``SERE_CPU_ISA`` asks for what does not run here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        cpu_isa.isa()
        ask_allocator_for_large_pages()
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        # Compiling SGLang's few small compiled functions takes longer than running them.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    return device


def read_text(job: CalibrationJob, tokenizer: Any) -> CalibrationText:
    """The windows to run. Raises `SereError` when they are too few for a measure."""
    if not tokenizer.encode("text"):
        raise SereError(
            f"--model {job.model}: its tokenizer makes nothing of text; are the tokenizer's files "
            "in the folder?"
        )
    text = read_windows(
        job.data,
        lambda document: tokenizer.encode(document),
        num_tokens=job.num_tokens,
        length=job.length,
        column=job.column,
        seed=job.seed,
    )
    check_enough(text.num_tokens, job.spec.measures, job.num_tokens, job.spec.surrogates)
    return text


def about(job: CalibrationJob, text: CalibrationText) -> dict[str, Any]:
    """What must be equal for a partial file to be continued."""
    return {
        "model": job.model,
        "weights": job.weights,
        "text": text.digest,
        "spec": {k: list(v) if isinstance(v, tuple) else v for k, v in job.spec.as_dict().items()},
        "layer_by_layer": job.layer_by_layer,
        "server_args": list(job.server_args),
    }


def resumable(job: CalibrationJob, text: CalibrationText) -> dict[str, Any] | None:
    """`about` of the partial file, None without ``--resume``.

    Raises `SereError` when it is of another calibration.
    """
    if not job.resume:
        return None
    _, kept = load_partial(job.partial)
    different = list(_differences(about(job, text), kept))
    if different:
        raise SereError(
            f"--resume: {job.partial} was made with another {', '.join(different)}; repeat the "
            "command that made it, or delete it and start without --resume"
        )
    if kept["windows_done"] > len(text.windows):
        raise unusable_partial(job.partial, "it has more of the text than there is")
    return kept


_FLAG_OF = {
    "model": "--model", "weights": "--model (its weights)",
    "text": "--data (or what is taken of it)",
    "layer_by_layer": "--layer-by-layer", "server_args": "set of SGLang flags",
    "measures": "--measure", "weighting": "--weighting", "memory": "--memory",
    "cka_tokens": "--cka-tokens", "surrogates": "--surrogate-rank",
}  # fmt: skip


def _differences(now: dict[str, Any], kept: dict[str, Any]) -> Iterator[str]:
    """What of a job is not as it was, in a user's words."""
    for name, value in now.items():
        before = kept.get(name)
        if name == "spec":
            yield from _differences(value, before or {})
            yield from (_FLAG_OF.get(gone, gone) for gone in (before or {}) if gone not in value)
        elif before != value:
            yield _FLAG_OF.get(name, name)


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise SereError("--device cuda: torch finds no GPU here; give --device cpu or auto")


def _check_out(out: Path) -> None:
    name = cut(str(out), PATH_SHOWN)
    if os.path.isdir(out):
        raise SereError(f"--out {name} is a folder; name the file to write")
    if is_no_regular_file(out):
        raise SereError(f"--out {name} is no regular file; name the file to write")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(writing(out.with_name(f"{out.name}.partial")))  # the longest name beside it
    except (OSError, ValueError) as error:  # the latter of a name with a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise SereError(f"--out {name}: {reason}; choose another place or name") from None
    if not can_write_in(out.parent):
        raise SereError(f"--out {name}: its folder is not writable; choose another place")


def about_model(read: Callable[[], MoeModelInfo]) -> MoeModelInfo:
    """What `read` returns; its refusal of a dense model, worded for the server's flag, names
    ``--model``."""
    try:
        return read()
    except SereError as error:
        text = str(error).replace("--moe-backend sere: ", "--model: ")
        raise SereError(text.split("; drop --moe-backend")[0]) from None


@contextlib.contextmanager
def readable(model: str) -> Iterator[None]:
    """SGLang raises all sorts of errors for a model that it cannot read; here they are one."""
    try:
        yield
    except SereError:
        raise
    except (OSError, ValueError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SereError(
            f"--model {model}: SGLang cannot read it ({what}); give a model folder, or the id of a "
            "model on the hub that this machine can reach"
        ) from None
