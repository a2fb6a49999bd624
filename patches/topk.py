"""Seam: ``layers.moe.topk._post_process_topk_ids`` (0.5.19 - 0.5.23).

Called with keyword arguments right after top-k by every router that emits standard top-k
output: logical ids, before the routed-experts capture, logical-to-physical mapping, padding
masks, the recorder's view and token dispatch. SGLang offers no hook between the two.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.backend.stage import stage_of
from sere_sglang.patches.seam import hook

_TARGET = "sglang.srt.layers.moe.topk._post_process_topk_ids"


def install() -> None:
    hook(
        _TARGET,
        _reroute,
        HookType.BEFORE,
        needs=["topk_ids", "topk_weights", "topk_config", "layer_id"],
    )


def _reroute(*args: Any, **kwargs: Any) -> None:
    stage = stage_of(kwargs["topk_config"] if "topk_config" in kwargs else args[2])
    if stage is not None:
        ids = kwargs["topk_ids"] if "topk_ids" in kwargs else args[0]
        weights = kwargs["topk_weights"] if "topk_weights" in kwargs else args[1]
        stage.run(ids, weights)
