"""Calibration through SGLang's own engine: whatever SGLang loads, as it will be served.

One request at a time, so that the order of the sums, and with it every bit of the profile, does
not depend on when the scheduler happens to look into its queue.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from sere_sglang.calibration.collection import load_partial
from sere_sglang.calibration.collector import Collector
from sere_sglang.calibration.job import (
    SAVE_EVERY_S,
    CalibrationJob,
    Interrupted,
    Progress,
    about,
    prepare_device,
    read_text,
    readable,
    resumable,
    seconds_between_saves,
)
from sere_sglang.calibration.result import State, layer_ids
from sere_sglang.calibration.text import CalibrationText
from sere_sglang.errors import SereError
from sere_sglang.profile import MoeModelInfo


def collect(
    job: CalibrationJob, progress: Progress, stop: Callable[[], bool]
) -> tuple[CalibrationText, State, MoeModelInfo]:
    """Start SGLang, run the text through it; the text, what was collected, the model's shape."""
    from sere_sglang.patches.calibration import WorkerDied

    with readable(job.model):
        record = _server_args(job)
        tokenizer = _tokenizer(record)
    progress(0, 0, "reading the text")
    text = read_text(job, tokenizer)
    kept = resumable(job, text)
    progress(0, 0, "loading the model")
    try:
        engine = _engine(record)
        try:
            state = _run(job, engine, text, kept, progress, stop)
        finally:
            engine.shutdown()
    except WorkerDied:
        raise SereError(_worker_died(job)) from None
    model = MoeModelInfo.from_config(_hf_config(record), name=job.model, revision=record.revision)
    return text, state, model.with_loaded(layer_ids(state))


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
    if prepare_device(job.device) == "cpu":
        flags += ["--device=cpu", "--attention-backend=torch_native"]
        flags += [f"--max-total-tokens={max(4 * job.length, 2048)}"]
    record = prepare_server_args([*flags, *job.server_args])
    _require_experts_in_place(record)
    calibration.attach(record, functools.partial(Collector, job.spec))
    return record


def _require_experts_in_place(record: Any) -> None:
    """Raise `SereError` for what puts experts elsewhere, or twice: they are asked by their ids."""
    moved = {
        "--enable-eplb": record.enable_eplb,
        "--ep-num-redundant-experts": record.ep_num_redundant_experts,
        "--init-expert-location": record.init_expert_location != "trivial",
    }
    given = [flag for flag, is_given in moved.items() if is_given]
    if given:
        raise SereError(
            f"--model: a calibration asks each expert at its own place; drop {', '.join(given)}, "
            "which a server may have all the same"
        )


def _tokenizer(record: Any) -> Any:
    from sglang.srt.utils.hf_transformers.tokenizer import get_tokenizer

    return get_tokenizer(
        record.tokenizer_path or record.model_path,
        trust_remote_code=record.trust_remote_code,
        tokenizer_revision=record.revision,
    )


def _engine(record: Any) -> Any:
    import signal

    from sere_sglang.patches import calibration

    # Ctrl-C reaches the whole process group, and the workers must outlive it to save their sums.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return calibration.start_engine(record)
    finally:
        signal.signal(signal.SIGINT, before)


def _run(
    job: CalibrationJob,
    engine: Any,
    text: CalibrationText,
    kept: dict[str, Any] | None,
    progress: Progress,
    stop: Callable[[], bool],
) -> State:
    """Run the text through the engine; returns the collected state of all layers."""
    call = _Remote(engine)
    done = kept["windows_done"] if kept else 0
    call("begin")
    if kept:
        call("restore", path=str(job.partial.absolute()))

    def save() -> None:
        told = {**about(job, text), "windows_done": done}
        call("save", path=str(job.partial.absolute()), about=told)

    next_save = time.monotonic() + SAVE_EVERY_S
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
        start = time.monotonic()
        if start > next_save:
            save()
            now = time.monotonic()
            next_save = now + seconds_between_saves(SAVE_EVERY_S, now - start)
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


def _worker_died(job: CalibrationJob) -> str:
    kept = ", and --resume to continue from what is saved" if job.partial.exists() else ""
    return (
        f"SGLang stopped while it ran {job.model}, its error is above; if memory ran out, use a "
        f"lower --memory (now {job.spec.memory >> 20}MiB) or --layer-by-layer{kept}"
    )


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


def _hf_config(record: Any) -> dict[str, Any]:
    from sglang.srt.arg_groups.overrides import model_config_of

    return model_config_of(record).hf_config.to_dict()
