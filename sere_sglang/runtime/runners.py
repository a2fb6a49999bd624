"""What SGLang's MoE runners and dispatchers make of a layer's rows and of its output.

Read in SGLang 0.5.23 and the kernels that it calls; none was run on a GPU. A runner that is not
listed in `TAKE_REPEATED_IDS` gets distinct rows (docs/semantics.md, rule 8), which suit all of
them.
"""

from __future__ import annotations

from typing import Any

import torch

TAKE_REPEATED_IDS = {
    "triton": "moe_align_block_size counts slots, and align_single_token breaks ties by slot",
    "marlin": "sorted by the same moe_align_block_size",
    "cutlass": "prepare_moe_input places each slot by itself",
}
"""``MoeRunnerBackend`` value -> why. Not: deep_gemm's masked layout and flashinfer_*, which lose
weights or write out of bounds where an expert has more slots than the batch has rows."""


def takes_repeated_ids(layer: Any) -> bool:
    """Whether a ``FusedMoE`` computes the same sum if slots of a row that met stay apart.

    Distinct rows cost a GPU something where A, what the batch runs, has fewer than K members:
    surplus slots then name experts outside it, which are loaded although their weight is 0.
    """
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher

    runner = getattr(layer.quant_method, "runner", None)
    backend = getattr(getattr(runner, "runner_backend", None), "value", None)
    # Dispatchers between ranks count rows by expert.
    return backend in TAKE_REPEATED_IDS and type(layer.dispatcher) is StandardDispatcher


def output_share(layer: Any) -> float:
    """Of a ``FusedMoE``'s output for its rows, what this rank returns: 1 where it is whole, 1 / n
    where the outputs of n ranks are added up behind it."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher
    from sglang.srt.layers.moe.utils import should_use_flashinfer_cutlass_moe_fp4_allgather

    # Other dispatchers, and an all-gather within the layer, hand whole rows back.
    if (
        layer.reduce_results
        or type(layer.dispatcher) is not StandardDispatcher
        or should_use_flashinfer_cutlass_moe_fp4_allgather()
    ):
        return 1.0
    return 1.0 / (int(layer.moe_tp_size) * int(layer.moe_ep_size))


def output_factor(layer: Any, topk_config: Any) -> float | None:
    """What a ``FusedMoE`` multiplies the weighted sum of its experts by; None if that is unknown.

    Models with a ``routed_scaling_factor`` have it multiplied into the routing weights by the
    router, or into the sum by the runner, or (the CPU engine) into the output by themselves.
    """
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher

    factor = layer.moe_runner_config.routed_scaling_factor
    on_cpu = any(p.device.type == "cpu" for p in layer.parameters())
    if factor in (None, 1.0) or on_cpu or scales_weights(topk_config):
        return 1.0
    if torch.version.hip or type(layer.dispatcher) is not StandardDispatcher:
        return None
    return float(factor)


def scales_weights(topk_config: Any) -> bool:
    """Whether a router's weights carry its model's ``routed_scaling_factor``."""
    from sglang.srt.layers.moe.topk import is_routed_scaling_factor_fused_in_topk

    return bool(is_routed_scaling_factor_fused_in_topk(topk_config))
