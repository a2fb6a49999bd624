"""Seams: what two architectures and DP attention lack on SGLang's CPU engine.

Qwen2-MoE's shared-expert gate is two Triton operators, called although there is no Triton
driver for a CPU: torch does the same arithmetic. DeepSeek-V2's prefill takes the Triton
backend's un-absorbed attention under ``--attention-backend torch_native``, which reads its
latent cache as if it held full keys: SGLang's own registry gets the absorbed form for it,
which decoding uses anyway. ``--enable-dp-attention`` pads batches, and asks the
torch-native attention backend for the length of a padding row, which only the AMX one tells.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.patches.seam import hook, resolve

_GATES = "sglang.kernels.ops.elementwise.elementwise"
_ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
_MLA = "sglang.srt.models.deepseek_common.attention_backend_handler"


def install() -> None:
    needs = ["hidden_states", "gate_weight", "shared_output"]
    hook(f"{_GATES}.fused_gate_sigmoid_mul", _gate, HookType.REPLACE, needs=needs)
    hook(f"{_GATES}.fused_gate_sigmoid_mul_add", _gate_add, HookType.REPLACE, needs=needs)
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


def _absorbed(_attention: Any, _forward_batch: Any) -> Any:
    return resolve(f"{_MLA}.AttnForwardMethod").MLA


def _padding_length(_backend: Any) -> int:
    return 1
