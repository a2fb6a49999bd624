"""Measured at start, in a few milliseconds: how fast this device reads and multiplies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from sere_sglang.schedule.cost import MoeCost

_READ_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}  # beyond every cache
_MATMUL_SIZE = {"cuda": 4096, "cpu": 512}
_ROUNDS = 3


def moe_cost(experts: Any, *, num_layers: int, top_k: int, device: torch.device) -> MoeCost:
    """Cost of the model's MoE layers on this rank.

    Args:
        experts: one of its ``FusedMoE`` modules, with weights loaded.
        num_layers: MoE layers on this rank.
        top_k: routed experts per token.
    """
    weights = [p for p in experts.parameters() if p.dim() >= 3]
    local = max(1, weights[0].shape[0])
    expert_bytes = sum(p.numel() * p.element_size() for p in weights) / local
    # A multiply and an add per weight; packed 4-bit weights count twice their elements.
    expert_flops = 2 * sum(p.numel() * (2 if p.element_size() == 1 else 1) for p in weights) / local
    spread = max(1, getattr(experts, "moe_ep_size", 1) or 1)  # ranks that share the active experts
    return MoeCost(
        expert_ms=expert_bytes / read_bytes_per_ms(device) / spread,
        slot_ms=expert_flops / flops_per_ms(device) / spread,
        num_layers=num_layers,
        top_k=top_k,
    )


def read_bytes_per_ms(device: torch.device) -> float:
    """Bytes read per millisecond by a sum over memory that no cache holds."""
    size = _READ_BYTES.get(device.type, _READ_BYTES["cpu"])
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    return size / _milliseconds(data.sum, device)


def flops_per_ms(device: torch.device) -> float:
    """bfloat16 matrix multiplication, operations per millisecond."""
    n = _MATMUL_SIZE.get(device.type, _MATMUL_SIZE["cpu"])
    a = torch.ones(n, n, dtype=torch.bfloat16, device=device)
    return 2 * n**3 / _milliseconds(lambda: a @ a, device)


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - started))
    return max(statistics.median(times[1:]), 1e-6)
