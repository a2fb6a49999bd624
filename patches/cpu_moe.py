"""Seam: ``moe_forward_native``, SGLang's MoE on its CPU engine without AMX, and ``load_model``.

The first loads the experts of slots of weight 0 too, which re-routing leaves where slots met, and
reads weights less well than ours, which stands in for it while SERE is on. Should ours fail, it
takes over: re-routed rows are distinct and give the same sums there. After the second, the
experts' weights are moved to large pages and packed (cpu_weights.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.cpu.large_pages import use_large_pages
from sere_sglang.cpu.moe import fused_moe, fused_moe_packed
from sere_sglang.errors import SereError
from sere_sglang.ops.surrogates import Compensation
from sere_sglang.patches import cpu_weights
from sere_sglang.patches.seam import hook
from sere_sglang.runtime.moe_layers import moe_layers
from sere_sglang.runtime.rule_stage import RuleStage
from sere_sglang.runtime.stage import stage_of

_LOAD = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
_TARGET = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"


def install() -> None:
    """Before what times layers after they load."""
    hook(_LOAD, _place_weights, HookType.AFTER)
    cpu_weights.install()
    hook(
        _TARGET,
        _run,
        HookType.AROUND,
        needs=["layer", "x", "topk_output", "moe_runner_config"],
        runs="until it fails",
    )


def _place_weights(_result: Any, runner: Any) -> None:
    for layer in moe_layers(runner.model).values():
        use_large_pages(*layer.parameters())
        cpu_weights.packed(layer)


def _run(
    _original: Callable[..., torch.Tensor],
    layer: Any,
    x: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
) -> torch.Tensor:
    config = moe_runner_config
    if config.apply_router_weight_on_input or config.gemm1_alpha is not None:
        raise SereError(
            "--moe-backend sere: this model's expert activation is not supported on the CPU "
            "engine (router weight on input, or gemm1_alpha); serve it on a GPU"
        )
    experts = cpu_weights.packed(layer)
    compensation = _compensation(layer)
    if experts is None:
        return run_experts(layer, x, topk_output, config, compensation=compensation)
    ids, weights = topk_output.topk_ids, topk_output.topk_weights
    how = _biases_and_activation(layer, config)
    return fused_moe_packed(x, experts, ids, weights, compensation=compensation, **how)


def run_experts(
    layer: Any, x: torch.Tensor, topk_output: Any, config: Any, **how: Any
) -> torch.Tensor:
    """`fused_moe` of a ``FusedMoE`` and its ``MoeRunnerConfig``, with options `how`."""
    ids, weights = topk_output.topk_ids, topk_output.topk_weights
    how |= _biases_and_activation(layer, config)
    return fused_moe(x, layer.w13_weight, layer.w2_weight, ids, weights, **how)


def _biases_and_activation(layer: Any, config: Any) -> dict[str, Any]:
    return {
        "activation": config.activation,
        "w13_bias": getattr(layer, "w13_weight_bias", None),
        "w2_bias": getattr(layer, "w2_weight_bias", None),
    }


def _compensation(layer: Any) -> Compensation | None:
    """Of what the layer's tokens lost, where its runner is the place to add it."""
    stage = stage_of(layer)
    rules = None if stage is None else stage.rules
    if not isinstance(rules, RuleStage):
        return None
    # What ranks add up within the layer would hold the whole of it once a rank: added behind that.
    if layer.reduce_results and layer.moe_tp_size * layer.moe_ep_size > 1:
        return None
    return rules.take_compensation()
