"""Seams: what two architectures, DP attention and expert parallelism lack on SGLang's CPU engine.

Qwen2-MoE's shared-expert gate is two Triton operators, called although there is no Triton
driver for a CPU: torch does the same arithmetic. DeepSeek-V2's prefill takes the Triton
backend's un-absorbed attention under ``--attention-backend torch_native``, which reads its
latent cache as if it held full keys: SGLang's own registry gets the absorbed form for it,
which decoding uses anyway. ``--enable-dp-attention`` pads batches, and asks the
torch-native attention backend for the length of a padding row, which only the AMX one tells.
``--ep-size`` marks slots of other ranks' experts with -1, which the MoE of a CPU without AMX takes
for an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.patches.cpu_moe import run_experts
from sere_sglang.patches.seam import hook, resolve

_GATES = "sglang.kernels.ops.elementwise.elementwise"
_ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
_MOE = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"
_MLA = "sglang.srt.models.deepseek_common.attention_backend_handler"


def install() -> None:
    needs = ["hidden_states", "gate_weight", "shared_output"]
    hook(f"{_GATES}.fused_gate_sigmoid_mul", _gate, HookType.REPLACE, needs=needs)
    hook(f"{_GATES}.fused_gate_sigmoid_mul_add", _gate_add, HookType.REPLACE, needs=needs)
    needs = ["layer", "x", "topk_output", "moe_runner_config"]
    hook(_MOE, _moe, HookType.AROUND, needs=needs, runs="always")
    resolve(f"{_MLA}.AttentionBackendRegistry").register("torch_native", _absorbed)
    backend = resolve(_ATTENTION)
    if not hasattr(backend, "get_cpu_graph_seq_len_fill_value"):
        backend.get_cpu_graph_seq_len_fill_value = _padding_length


def _gate(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, shared_output: torch.Tensor
) -> torch.Tensor:
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.float().reshape(-1, 1))
    return (gate * shared_output.float()).to(shared_output.dtype)


def _gate_add(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    final_hidden_states += _gate(hidden_states, gate_weight, shared_output)


def _moe(
    original: Callable[..., torch.Tensor],
    layer: Any,
    x: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
) -> torch.Tensor:
    config = moe_runner_config
    known = config.gemm1_alpha is None and not config.apply_router_weight_on_input
    if layer.moe_ep_size == 1 or not known:
        return original(layer, x, topk_output, config)
    return run_experts(layer, x, topk_output, config, impl="torch")


def _absorbed(_attention: Any, _forward_batch: Any) -> Any:
    return resolve(f"{_MLA}.AttnForwardMethod").MLA


def _padding_length(_backend: Any) -> int:
    return 1
