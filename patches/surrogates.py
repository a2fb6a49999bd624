"""Seam: ``FusedMoE.forward``: what its tokens lost is made up for.

Around every runner and quantization: input and output of a layer are there, each rank's output
still to be added to the others'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.patches.seam import hook
from sere_sglang.runtime.stage import stage_of

_LAYER = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.forward"


def install() -> None:
    hook(_LAYER, _forward, HookType.AROUND, needs=["hidden_states", "topk_output"])


def _forward(
    original: Callable[..., torch.Tensor],
    layer: Any,
    hidden_states: torch.Tensor,
    topk_output: Any,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    stage = stage_of(layer)
    rules = None if stage is None else stage.rules
    if rules is None:
        return original(layer, hidden_states, topk_output, *args, **kwargs)
    # First, for some runners write their output over their input.
    compensation: Any = rules.compensation(hidden_states)
    output = original(layer, hidden_states, topk_output, *args, **kwargs)
    return output if compensation is None else rules.add_compensation(output, compensation)
