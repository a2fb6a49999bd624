"""``impl="cpu"`` of `apply_rule`: the rules in C++ (``csrc/rules_cpu.cpp``)."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sere_sglang.ops.jit import load_module
from sere_sglang.ops.rules_call import CODES, Routed, RuleCall


def is_available(device_type: str) -> str | None:
    """CPU tensors only."""
    return None if device_type == "cpu" else f"serves CPU tensors, not {device_type}"


@functools.cache
def _function() -> Any:
    # A fused multiply-add rounds once where the reference rounds twice.
    flags = ["-ffp-contract=off"]
    return load_module("rules_cpu", ["rules_cpu.cpp"], extra_cflags=flags).apply_rule


def build() -> None:
    _function()


def apply(call: RuleCall, counters: torch.Tensor | None = None) -> Routed:
    """See `Implementation.apply`."""
    num_rows = call.ids.shape[0]
    routed = Routed(
        call.ids.clone(),
        call.weights.clone(),
        torch.zeros(call.num_experts, dtype=torch.bool),
        torch.zeros(num_rows, call.num_experts),
    )
    _function()(
        call.ids,
        call.weights,
        call.scores,
        call.similarity,
        call.expert_loss,
        call.protected,
        call.fast,
        counters,
        *routed,
        CODES[call.rule],
        call.num_valid,
        call.keep,
        call.fast_keep,
        call.budget,
        call.warmup,
        call.truncate,
        call.loss_limit,
        call.threshold,
        call.fill_weight,
        call.renormalize,
    )
    return routed
