"""Seam: ``ForwardBatch.init_new`` (0.5.13 - 0.5.23): the last place that still has the requests.

Rows of a decode or verify batch lie in the order of ``ScheduleBatch.reqs``; what they asked for
travels on the ``ForwardBatch`` to the forward (patches/model_runner.py).
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang import runtime
from sere_sglang.patches.seam import hook

_TARGET = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
_ATTRIBUTE = "_sere_request_classes"


def install() -> None:
    hook(_TARGET, _note_requests, HookType.AFTER, needs=["batch", "model_runner"])


def _note_requests(result: Any, _cls: type, *args: Any, **kwargs: Any) -> None:
    active = runtime.current()
    mode = result.forward_mode
    if active is None or not (mode.is_decode() or mode.is_target_verify()):
        return
    batch = kwargs["batch"] if "batch" in kwargs else args[0]
    class_of = active.quality_rules.class_of
    classes = [class_of(request.sampling_params.custom_params) for request in batch.reqs]
    setattr(result, _ATTRIBUTE, classes)


def request_classes(forward_batch: Any) -> list[int]:
    """Row class of each request of a decode-like batch; empty when nothing is known."""
    return getattr(forward_batch, _ATTRIBUTE, [])
