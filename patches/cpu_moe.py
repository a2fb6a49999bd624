"""Seam: ``moe_forward_native``, SGLang's MoE on its CPU engine without AMX, and ``load_model``.

The first counts tokens per expert with ``scatter_``, so a row that holds one expert twice, which
re-routing produces, breaks it. Ours stands in for it while SERE is on. After the second, the
experts' weights are moved to large pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.cpu.large_pages import use_large_pages
from sere_sglang.cpu.moe import fused_moe
from sere_sglang.errors import SereError
from sere_sglang.patches.seam import hook
from sere_sglang.runtime.moe_layers import moe_layers

_LOAD = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
_TARGET = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"


def install() -> None:
    """Before what times layers after they load."""
    hook(_LOAD, _place_weights, HookType.AFTER)
    hook(
        _TARGET,
        _run,
        HookType.AROUND,
        needs=["layer", "x", "topk_output", "moe_runner_config"],
        runs="until it fails",
        otherwise=_run_sglangs,
    )


def _place_weights(_result: Any, runner: Any) -> None:
    for layer in moe_layers(runner.model).values():
        use_large_pages(*layer.parameters())


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


def _run_sglangs(
    original: Callable[..., torch.Tensor],
    layer: Any,
    x: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
) -> torch.Tensor:
    """In the step in which ours failed, which may be a re-routed one."""
    ids, weights = distinct(
        topk_output.topk_ids, topk_output.topk_weights, layer.w2_weight.shape[0]
    )
    output = topk_output._replace(topk_ids=ids, topk_weights=weights)
    return original(layer, x, output, moe_runner_config)


def distinct(
    ids: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same sums with no expert twice in a row: `ids`, `weights` [T, K].

    The first slot of an expert takes the weights of the others, which get experts that the row
    does not use, with weight 0.
    """
    ids, weights = ids.clone(), weights.clone()
    for own, weight in zip(ids, weights, strict=True):
        first: dict[int, int] = {}
        free = iter(sorted(set(range(num_experts)) - set(own.tolist())))
        for slot, expert in enumerate(own.tolist()):
            if expert >= 0 and first.setdefault(expert, slot) != slot:
                weight[first[expert]] += weight[slot]
                weight[slot] = 0
                own[slot] = next(free)
    return ids, weights
