"""``sere-sglang calibrate``: drives SGLang's engine over text and writes the profile.

One request at a time, so that the order of the sums, and with it every bit of the profile, does
not depend on when the scheduler happens to look into its queue.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sere_sglang.errors import SereError
from sere_sglang.profile import (
    MoeModelInfo,
    ProfileMetadata,
    SereProfile,
    save_profile,
    weights_fingerprint,
)
from sere_sglang.profile.collection import CollectionSpec, check_enough, load_partial
from sere_sglang.profile.measures import (
    MOMENT_MEASURES,
    Moments,
    similarity,
    substitution_scale,
)
from sere_sglang.profile.text import CalibrationText, check_files, read_windows

SAVE_EVERY_S = 30.0


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
    server_args: tuple[str, ...] = ()

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")


class Interrupted(Exception):
    """Ctrl-C; everything collected is in the partial file."""


Progress = Callable[[int, int, str], None]
"""Called with (tokens done, tokens in all, what is being done)."""


def calibrate(
    job: CalibrationJob,
    *,
    progress: Progress = lambda done, total, what: None,
    stop: Callable[[], bool] = lambda: False,
) -> SereProfile:
    """Run the calibration and write ``job.out``. `stop` is asked between two sequences.

    Raises `SereError` for anything the user can fix, `Interrupted` when `stop` answers True.
    """
    check_job(job)
    choose_device(job.device)
    record = _server_args(job)
    progress(0, 0, "reading the text")
    text = _text(job, record)
    kept = None
    if job.resume:
        kept = _resumable(job, text)
    progress(0, 0, "loading the model")
    engine = _engine(record)
    try:
        state = _collect(job, engine, text, kept, progress, stop)
    finally:
        engine.shutdown()
    profile = build_profile(job, text, state, _hf_config(record))
    try:
        save_profile(profile, job.out)
    except OSError as error:
        raise SereError(
            f"--out {job.out}: cannot be written ({error}); free some space and repeat the "
            f"command with --resume, everything is in {job.partial}"
        ) from None
    job.partial.unlink(missing_ok=True)
    return profile


def check_job(job: CalibrationJob) -> None:
    """Everything that can be refused before SGLang is even imported. Raises `SereError`."""
    if not job.resume and job.partial.exists():
        raise SereError(
            f"{job.partial} holds an unfinished calibration; continue it with --resume or delete it"
        )
    check_files(job.data)
    _check_out(job.out)
    if os.path.isdir(job.model):
        _check_model(job.model)


def choose_device(device: str) -> str:
    """Resolve ``auto``; on a CPU, ask SGLang for its CPU engine before SGLang is imported."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        # Compiling SGLang's few small compiled functions takes longer than running them.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    return device


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise SereError(f"--out {out} is a folder; name the file to write")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SereError(f"--out {out}: {error}; choose another place") from None
    if not os.access(out.parent, os.W_OK):
        raise SereError(f"--out {out}: {out.parent} is not writable; choose another place")


def _check_model(folder: str) -> None:
    """Refuse a dense model before anything loads."""
    try:
        MoeModelInfo.from_folder(folder)
    except SereError as error:
        # Worded for the server's flag.
        text = str(error).replace("--moe-backend sere: ", "--model: ")
        raise SereError(text.split("; drop --moe-backend")[0]) from None


def _server_args(job: CalibrationJob) -> Any:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    from sere_sglang.patches import calibration

    flags = [
        f"--model-path={job.model}",
        "--disable-radix-cache",  # a cached token would not be observed
        "--disable-cuda-graph",
        "--disable-overlap-schedule",
        "--disable-shared-experts-fusion",
        "--max-running-requests=1",
        f"--chunked-prefill-size={max(job.length, 512)}",
        "--skip-server-warmup",
        "--sleep-on-idle",
        "--watchdog-timeout=36000",  # all experts on one block may take long on a CPU
        "--log-level=error",
        f"--random-seed={job.seed}",
    ]
    if choose_device(job.device) == "cpu":
        flags += ["--device=cpu", "--attention-backend=torch_native"]
        flags += [f"--max-total-tokens={max(4 * job.length, 2048)}"]
    record = prepare_server_args([*flags, *job.server_args])
    calibration.attach_spec(record, job.spec)
    return record


def _text(job: CalibrationJob, record: Any) -> CalibrationText:
    from sglang.srt.utils.hf_transformers.tokenizer import get_tokenizer

    tokenizer = get_tokenizer(
        record.tokenizer_path or record.model_path, trust_remote_code=record.trust_remote_code
    )
    text = read_windows(
        job.data,
        lambda document: tokenizer.encode(document),
        num_tokens=job.num_tokens,
        length=job.length,
        column=job.column,
        seed=job.seed,
    )
    check_enough(text.num_tokens, job.spec.measures, job.num_tokens)
    return text


def _about(job: CalibrationJob, text: CalibrationText) -> dict[str, Any]:
    """What must be equal for a partial file to be continued."""
    return {
        "model": job.model,
        "weights": weights_fingerprint(job.model),
        "text": text.digest,
        "spec": {k: list(v) if isinstance(v, tuple) else v for k, v in job.spec.as_dict().items()},
        "server_args": list(job.server_args),
    }


def _resumable(job: CalibrationJob, text: CalibrationText) -> dict[str, Any]:
    """`about` of the partial file. Raises `SereError` when it is of another calibration."""
    _, about = load_partial(job.partial)
    ours = _about(job, text)
    different = [name for name, value in ours.items() if about.get(name) != value]
    if different:
        raise SereError(
            f"--resume: {job.partial} was made with another {', '.join(different)}; repeat the "
            "command that made it, or delete it and start without --resume"
        )
    return about


def _engine(record: Any) -> Any:
    import signal

    from sglang.srt.entrypoints.engine import Engine

    # Ctrl-C reaches the whole process group, and the workers must outlive it to save their sums.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return Engine(server_args=record)
    finally:
        signal.signal(signal.SIGINT, before)


def _collect(
    job: CalibrationJob,
    engine: Any,
    text: CalibrationText,
    kept: dict[str, Any] | None,
    progress: Progress,
    stop: Callable[[], bool],
) -> dict[str, torch.Tensor]:
    """Run the text through the engine; returns the collected state of all layers."""
    call = _Remote(engine)
    done = kept["windows_done"] if kept else 0
    call("begin")
    if kept:
        call("restore", path=str(job.partial.absolute()))

    def save() -> None:
        about = {**_about(job, text), "windows_done": done}
        call("save", path=str(job.partial.absolute()), about=about)

    saved = time.monotonic()
    tokens = sum(map(len, text.windows[:done]))
    for window in text.windows[done:]:
        progress(tokens, text.num_tokens, "running all experts")
        engine.generate(input_ids=window, sampling_params={"max_new_tokens": 1, "temperature": 0})
        call("check")
        done += 1
        tokens += len(window)
        if stop():
            save()
            raise Interrupted
        if time.monotonic() - saved > SAVE_EVERY_S:
            save()
            saved = time.monotonic()
    save()
    layers = layer_ids(load_partial(job.partial)[0])
    for n, layer in enumerate(layers):
        progress(tokens, text.num_tokens, f"computing similarities, layer {n + 1}/{len(layers)}")
        call("finish", layer=layer)
        if stop():
            save()
            raise Interrupted
    save()
    state, _ = load_partial(job.partial)
    return state


class _Remote:
    """Calls `Collector.call` on every rank; its `SereError` comes back as one."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __call__(self, action: str, **arguments: Any) -> None:
        from sere_sglang.patches.calibration import RPC

        try:
            self.engine.collective_rpc(RPC, action=action, **arguments)
        except AssertionError as error:
            raise SereError(str(error)) from None


def layer_ids(state: dict[str, torch.Tensor]) -> list[int]:
    return sorted({int(name.split("/")[0]) for name in state})


def build_profile(
    job: CalibrationJob,
    text: CalibrationText,
    state: dict[str, torch.Tensor],
    hf_config: dict[str, Any],
) -> SereProfile:
    """The profile of what was collected: the first measure leads, the others are tables."""
    from sere_sglang import __version__

    model = MoeModelInfo.from_config(hf_config, name=job.model)
    matrices: dict[int, torch.Tensor] = {}
    tables: dict[int, dict[str, torch.Tensor]] = {}
    for layer in layer_ids(state):
        own = {n.split("/", 1)[1]: t for n, t in state.items() if n.startswith(f"{layer}/")}
        moments = Moments(
            own["gram"].shape[0], measures=job.spec.measures, weighting=job.spec.weighting
        )
        moments.sums = {name: own[name] for name in moments.sums}
        by_measure = {
            measure: similarity(moments, measure)
            if measure in MOMENT_MEASURES
            else own[f"cka.{measure}"]
            for measure in job.spec.measures
        }
        matrices[layer] = by_measure[job.spec.measures[0]]
        table = {
            f"similarity_{measure.replace('-', '_')}": by_measure[measure]
            for measure in job.spec.measures[1:]
        }
        if "residual" in job.spec.measures:
            table["scale"] = substitution_scale(moments)
        table["popularity"] = moments.coactivation.diagonal().clone()
        table["popularity_by_rank"] = own["rank_counts"]
        table["coactivation"] = moments.coactivation
        tables[layer] = table
    parameters = {
        "measures": list(job.spec.measures),
        "weighting": job.spec.weighting,
        "length": job.length,
        "seed": job.seed,
        "text_digest": text.digest,
    }
    if job.spec.cka_measures:
        parameters["cka_tokens"] = min(job.spec.cka_tokens, text.num_tokens)
    if job.server_args:
        parameters["server_args"] = list(job.server_args)
    metadata = ProfileMetadata(
        model=job.model,
        architecture=model.architecture,
        fingerprint=model.fingerprint,
        weights=weights_fingerprint(job.model),
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        hidden_size=model.hidden_size,
        method=job.spec.measures[0],
        method_parameters=parameters,
        data=text.name,
        num_tokens=text.num_tokens,
        tool_version=__version__,
        date=_today(),
    )
    return SereProfile(metadata, matrices, tables)


def _hf_config(record: Any) -> dict[str, Any]:
    from sglang.srt.arg_groups.overrides import model_config_of

    return model_config_of(record).hf_config.to_dict()


def _today() -> str:
    """The day only, or that of SOURCE_DATE_EPOCH: the same calibration gives the same bytes."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = float(epoch) if epoch else time.time()
    return datetime.datetime.fromtimestamp(now, datetime.timezone.utc).date().isoformat()
