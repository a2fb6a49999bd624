"""Seam: what reads or changes a model's weights behind our CPU runner's back.

Our runner packs a layer's experts where they are (sere_sglang/cpu/packed.py). Whatever else takes
hold of them gets the rows back first: SGLang's own MoE, should ours fail; updates of the weights of
a running server, their export and their check. The runner packs them again when it runs next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.cpu.moe import pack_experts
from sere_sglang.cpu.packed import PackedExperts
from sere_sglang.patches.seam import hook, resolve
from sere_sglang.runtime.moe_layers import moe_layers

ATTRIBUTE = "_sere_packed"

_MOE = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"
_COMPONENTS = "sglang.srt.model_executor.model_runner_components"
_OF_MODELS = (
    f"{_COMPONENTS}.weight_updater.WeightUpdater.update_weights_from_disk",
    f"{_COMPONENTS}.weight_updater.WeightUpdater.begin_weight_update",
    f"{_COMPONENTS}.weight_updater.WeightUpdater.load_weights_from_distributed",
    f"{_COMPONENTS}.weight_updater.WeightUpdater.update_weights_from_tensor",
    f"{_COMPONENTS}.weight_updater.WeightUpdater.update_weights_from_ipc",
    f"{_COMPONENTS}.weight_exporter.WeightExporter.send_weights_to_remote_instance",
    f"{_COMPONENTS}.weight_exporter.WeightExporter.save_remote_model",
    f"{_COMPONENTS}.weight_exporter.WeightExporter.save_sharded_model",
    f"{_COMPONENTS}.weight_exporter.WeightExporter.get_weights_by_name",
    "sglang.srt.utils.weight_checker.WeightChecker.handle",
)


def install() -> None:
    """Nothing of this may be left out when a hook of ours has failed: SGLang's functions are
    replaced by themselves, with the rows in place."""
    moe = resolve(_MOE)

    def with_rows(layer: Any, *args: Any, **kwargs: Any) -> Any:
        give_rows(layer)
        return moe(layer, *args, **kwargs)

    hook(_MOE, with_rows, HookType.REPLACE, needs=["layer"])
    for target in _OF_MODELS:
        hook(target, _with_rows_of_model(resolve(target)), HookType.REPLACE)


def packed(layer: Any) -> PackedExperts | None:
    """A ``FusedMoE``'s experts as our kernels read them; None where these do not."""
    experts = getattr(layer, ATTRIBUTE, None)
    if experts is None and _is_ours(layer):
        experts = pack_experts(layer.w13_weight.data, layer.w2_weight.data)
        setattr(layer, ATTRIBUTE, experts)
    return experts


def give_rows(layer: Any) -> None:
    """Put the weights back as SGLang loaded them."""
    experts = getattr(layer, ATTRIBUTE, None)
    if experts is not None:
        setattr(layer, ATTRIBUTE, None)
        experts.unpack()


def _is_ours(layer: Any) -> bool:
    """Not what is quantized, what SGLang has packed for its own AMX kernels, nor what `fused_moe`
    refuses: it says so when it is called."""
    if not isinstance(getattr(layer, "quant_method", None), UnquantizedFusedMoEMethod):
        return False
    if getattr(layer, "use_intel_amx_backend", False):
        return False
    w13, w2 = layer.w13_weight, layer.w2_weight
    return (
        w13.dtype == w2.dtype
        and w2.dtype in (torch.bfloat16, torch.float32)
        and w13.is_contiguous()
        and w2.is_contiguous()
        and w2.dim() == 3
        and list(w13.shape) == [w2.shape[0], 2 * w2.shape[2], w2.shape[1]]
    )


def _with_rows_of_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def replaced(holder: Any, *args: Any, **kwargs: Any) -> Any:
        get_model = getattr(holder, "get_model", None) or holder._get_model
        for layer in moe_layers(get_model()).values():
            give_rows(layer)
        return original(holder, *args, **kwargs)

    return replaced
