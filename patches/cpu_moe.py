"""Seam: ``moe_forward_native``, SGLang's MoE on its CPU engine without AMX (0.5.13 - 0.5.23).

It counts tokens per expert with ``scatter_``, so a row that holds one expert twice, which
re-routing produces, breaks it. Ours replaces it while SERE is on.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.backend.cpu_moe import fused_moe
from sere_sglang.errors import SereError
from sere_sglang.patches.seam import hook

_TARGET = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"


def install() -> None:
    hook(_TARGET, _run, HookType.REPLACE, needs=["layer", "x", "topk_output", "moe_runner_config"])


def _run(layer: Any, x: torch.Tensor, topk_output: Any, moe_runner_config: Any) -> torch.Tensor:
    config = moe_runner_config
    if config.apply_router_weight_on_input or config.gemm1_alpha is not None:
        raise SereError(
            "--moe-backend sere: this model's expert activation is not supported on the CPU "
            "engine (router weight on input, or gemm1_alpha); serve it on a GPU"
        )
    return fused_moe(
        x,
        layer.w13_weight,
        layer.w2_weight,
        topk_output.topk_ids,
        topk_output.topk_weights,
        activation=config.activation,
        w13_bias=getattr(layer, "w13_weight_bias", None),
        w2_bias=getattr(layer, "w2_weight_bias", None),
    )
