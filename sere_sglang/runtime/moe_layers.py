"""The MoE layers and routers of a model that SGLang has built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from sere_sglang.errors import SereError


def moe_layers(model: torch.nn.Module) -> dict[int, Any]:
    """layer id -> ``FusedMoE`` with routed experts."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    return {
        module.layer_id: module
        for module in model.modules()
        if isinstance(module, FusedMoE) and not module.is_shared_fused_moe
    }


def decoder_layers(model: torch.nn.Module, layers: Mapping[int, Any]) -> dict[int, torch.nn.Module]:
    """layer id -> the numbered block of `model` that holds a MoE layer, as ``model.layers.3``."""
    ids = {id(layer): layer_id for layer_id, layer in layers.items()}
    found = {}
    for name, module in model.named_modules():
        block = re.match(r"(.*\.\d+)\.", name)
        if id(module) in ids and block:
            found[ids[id(module)]] = model.get_submodule(block[1])
    return found


def routers_of(model: torch.nn.Module) -> dict[int, Any]:
    """layer id -> ``TopK``."""
    from sglang.srt.layers.moe.topk import TopK

    return {
        module.layer_id: module
        for module in model.modules()
        if isinstance(module, TopK) and not module.is_draft
    }


def routed_top_k(router: Any) -> int:
    """Experts per token that its ``TopK`` chooses, without fused shared experts."""
    topk_config = router.topk_config
    return int(topk_config.top_k - topk_config.num_shared_topk_slots)


def require_weights_on_output(layer: Any, model_name: str) -> None:
    """Raise `SereError` for a ``FusedMoE`` that multiplies its input by the routing weights.

    Slots that meet on one expert are added up, which is right only behind the experts.
    """
    if layer.moe_runner_config.apply_router_weight_on_input:
        raise SereError(
            f"--moe-backend sere: {model_name} applies routing weights to the input of its "
            "experts, where they cannot be re-routed; serve it without --moe-backend sere"
        )


def require_probabilities(router: Any, runner: str, model_name: str) -> None:
    """Raise `SereError` for a ``TopK`` whose weights are logits.

    For ``flashinfer_trtllm_routed`` SGLang 0.5.23 takes a softmax router's top-k of its logits, and
    applies the softmax only where the model renormalizes (``fused_topk_softmax_torch_raw_logits``).
    """
    config = router.topk_config
    if runner == "flashinfer_trtllm_routed" and is_plain_softmax(config) and not config.renormalize:
        raise SereError(
            f"--moe-backend sere: {model_name} does not renormalize its routing weights, and for "
            f"--moe-runner-backend {runner} SGLang's router then hands on logits in their place; "
            "use --moe-runner-backend triton, or flashinfer_cutlass for a model in nvfp4"
        )


def is_plain_softmax(topk_config: Any) -> bool:
    """Whether SGLang's ``fused_topk`` routes this layer, if its call does not say otherwise."""
    return (
        topk_config.scoring_func == "softmax"
        and not topk_config.use_grouped_topk
        and topk_config.custom_routing_function is None
        and topk_config.correction_bias is None
    )


def require_standard_format(
    router: Any, model_name: str, *, asked: str = "--moe-backend sere"
) -> None:
    """Raise `SereError`, naming what was `asked`, when the runner routes inside its kernel."""
    from sglang.srt.layers.moe.topk import TopKOutputFormat

    topk_config = router.topk_config
    if topk_config.output_format not in (None, TopKOutputFormat.STANDARD):
        backend = topk_config.runner_backend
        raise SereError(
            f"{asked}: {model_name} runs --moe-runner-backend "
            f"{getattr(backend, 'value', backend)}, which routes inside its kernel "
            f"({topk_config.output_format.name.lower()}); choose another, for instance "
            "--moe-runner-backend triton, or marlin for a model in mxfp4 such as gpt-oss"
        )
