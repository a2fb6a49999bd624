"""Seams: ``PrefillCudaGraphRunner.capture`` and ``DecodeCudaGraphRunner.capture_one_shape``.

Prefill is never re-routed, so its graphs are captured as an eager prefill runs: without our launch,
and with SGLang's own router. Each graph of decoding, once captured, must hold every layer's launch:
a replay passes no line of Python that could tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.patches.seam import hook
from sere_sglang.runtime import process

_RUNNERS = "sglang.srt.model_executor.runner"


def install() -> None:
    hook(
        f"{_RUNNERS}.prefill_cuda_graph_runner.PrefillCudaGraphRunner.capture",
        _capture_prefill,
        HookType.AROUND,
    )
    hook(
        f"{_RUNNERS}.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture_one_shape",
        _capture_decode,
        HookType.AROUND,
        needs=["size", "forward"],
    )


def _capture_prefill(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    active = process.current()
    if active is None or runner.model_runner.is_draft_worker:
        return original(runner, *args, **kwargs)
    with active.binding.capturing(launch=False):
        result = original(runner, *args, **kwargs)
    active.note_captured()
    return result


def _capture_decode(
    original: Callable[..., Any], runner: Any, size: int, *args: Any, **kwargs: Any
) -> Any:
    active = process.current()
    if active is None or runner.model_runner.is_draft_worker:
        return original(runner, size, *args, **kwargs)
    active.binding.forget_runs()
    with active.binding.capturing(launch=True):
        result = original(runner, size, *args, **kwargs)
    active.note_captured(size)
    return result
