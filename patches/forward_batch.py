"""Seam: ``ForwardBatch.init_new``: the last place that still has the requests.

Rows of a decode or verify batch lie in the order of ``ScheduleBatch.reqs``; what they asked for
travels on the ``ForwardBatch`` to the forward (patches/model_runner.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.patches.seam import hook
from sere_sglang.runtime import process

_TARGET = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
_ATTRIBUTE = "_sere_noted"


@dataclass(frozen=True)
class Noted:
    """What a ``ForwardBatch`` itself does not say. classes: row class of each request."""

    classes: tuple[int, ...] = ()
    running: int = 0
    waiting: int = 0
    after_idle: bool = False


def install() -> None:
    hook(_TARGET, _note, HookType.AFTER, needs=["batch", "model_runner"])


def _note(result: Any, _cls: type, *args: Any, **kwargs: Any) -> None:
    active = process.current()
    if active is None:
        return
    batch = kwargs["batch"] if "batch" in kwargs else args[0]
    mode = result.forward_mode
    classes: tuple[int, ...] = ()
    if mode.is_decode() or mode.is_target_verify():
        class_of = active.quality_rules.class_of
        classes = tuple(class_of(r.sampling_params.custom_params) for r in batch.reqs)
    running, waiting = active.service.queue()
    noted = Noted(classes, running, waiting, bool(getattr(batch, "after_idle_gap", False)))
    setattr(result, _ATTRIBUTE, noted)


def noted(forward_batch: Any) -> Noted:
    """Of a forward batch that SGLang's scheduler made; nothing is known of others."""
    return getattr(forward_batch, _ATTRIBUTE, None) or Noted()
