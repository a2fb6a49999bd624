"""Which of a model's ``FusedMoE`` layers are alike, and what their weights weigh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sere_sglang.schedule.layer_cost import LayerShape

_PACKED = {torch.uint8: 2, torch.int32: 8}
"""Weights in an element, where 4-bit formats (NVFP4 and MXFP4, Marlin) put several into one."""


def by_shape(layers: Mapping[int, Any], top_k: Mapping[int, int]) -> dict[LayerShape, list[int]]:
    """Shape -> ids of the layers that have it, both in the order of the layers.

    Args:
        layers: layer id -> ``FusedMoE``, with weights loaded.
        top_k: layer id -> routed experts per token.
    """
    ids: dict[LayerShape, list[int]] = {}
    for layer in sorted(layers):
        ids.setdefault(shape_of(layers[layer], top_k[layer]), []).append(layer)
    return ids


def shape_of(experts: Any, top_k: int) -> LayerShape:
    """Of a ``FusedMoE`` module."""
    ranks = getattr(experts, "moe_ep_size", 1) or 1
    size, flops = expert_weights(experts)
    return LayerShape(
        num_experts=experts.num_global_routed_experts,
        top_k=top_k,
        hidden_size=experts.hidden_size,
        intermediate_size=experts.intermediate_size_per_partition,
        weights=_weights(experts),
        expert_bytes=size,
        slot_flops=flops,
        share=1.0 / ranks,
    )


def _weights(experts: Any) -> str:
    """How they are held, and the grouped GEMM that reads them where SGLang names one."""
    method = type(experts.quant_method).__name__
    dtype = str(getattr(experts, "params_dtype", "")).removeprefix("torch.")
    names = [dtype if method == "UnquantizedFusedMoEMethod" else method]
    backend = getattr(experts, "runner_backend", None)
    on_cpu = any(p.device.type == "cpu" for p in experts.parameters())
    if backend is not None and not on_cpu:  # the CPU engine has a runner of its own
        names.append(str(getattr(backend, "value", backend)))
    return ", ".join(names)


def expert_weights(experts: Any) -> tuple[float, float]:
    """Bytes of an expert on this rank, and operations of a slot: a multiply and an add per weight.

    Repacked or paged experts may have no parameters with an expert dimension; then as
    many weights as the sizes say, in the layer's own type.
    """
    held = [p for p in experts.parameters() if p.dim() >= 3 and p.shape[0] > 0]
    if held:
        size = sum(p.numel() * p.element_size() / p.shape[0] for p in held)
        weights = sum(p.numel() * _PACKED.get(p.dtype, 1) / p.shape[0] for p in held)
        return size, 2.0 * weights
    matrices = 3 if getattr(experts.moe_runner_config, "is_gated", True) else 2
    count = matrices * experts.hidden_size * experts.intermediate_size_per_partition
    dtype = getattr(experts, "params_dtype", None) or torch.bfloat16
    return float(count * dtype.itemsize), 2.0 * count
