"""Seam: ``ModelRunner.load_model`` and ``ModelRunner.forward`` (0.5.13 - 0.5.23).

The first has the weights and no CUDA graph yet; the second sees every forward of a rank,
graph or eager, before it runs and before padding. Draft models are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang import runtime
from sere_sglang.backend.bind import bind_model
from sere_sglang.patches.seam import hook
from sere_sglang.schedule.composition import BatchComposition, Mode

_TARGET = "sglang.srt.model_executor.model_runner.ModelRunner"

_MODES: dict[str, Mode] = {
    "DECODE": "decode",
    "TARGET_VERIFY": "verify",
    "MIXED": "mixed",
    "IDLE": "idle",
}


def install() -> None:
    hook(f"{_TARGET}.load_model", _bind, HookType.AFTER)
    hook(f"{_TARGET}.forward", _forward, HookType.AROUND, needs=["forward_batch"])


def _bind(_result: Any, runner: Any) -> None:
    active = runtime.current()
    if active is not None and not runner.is_draft_worker:
        active.attach(bind_model(runner.model, active.config, device=runner.device))


def _forward(
    original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    active = runtime.current()
    if active is None or runner.is_draft_worker or active.binding is None:
        return original(runner, forward_batch, *args, **kwargs)
    active.begin_forward(composition_of(forward_batch))
    try:
        return original(runner, forward_batch, *args, **kwargs)
    finally:
        active.end_forward()


def composition_of(batch: Any) -> BatchComposition:
    """The batch that is about to run, from SGLang's ``ForwardBatch`` (before padding)."""
    mode = _MODES.get(batch.forward_mode.name, "extend")
    tokens = 0 if mode == "idle" else int(batch.input_ids.shape[0])
    decode = verify = prefill = 0
    if mode == "decode":
        decode = tokens
    elif mode == "verify":
        verify = tokens
    elif mode == "mixed":
        lengths = batch.extend_seq_lens_cpu or []
        prefill = sum(n for n in lengths if n > 1)
        decode = tokens - prefill
    else:
        prefill = tokens
    return BatchComposition(
        mode=mode, decode_tokens=decode, prefill_tokens=prefill, verify_tokens=verify
    )
