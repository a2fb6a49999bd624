"""The CUDA kernels, run by the emulator (native/reroute_emulation.h): an implementation for
tests."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sere_sglang.ops import LayerTable
from sere_sglang.ops.cuda import reroute as cuda
from sere_sglang.ops.cuda import rules as rules_cuda
from sere_sglang.ops.cuda.plan import Plan
from sere_sglang.ops.cuda.rules_fused import Selected
from sere_sglang.ops.fused import new_slots
from sere_sglang.ops.jit import load_module
from sere_sglang.ops.rules_call import LostSlots, Routed, RuleCall
from sere_sglang.ops.rules_device import apply_copy

NATIVE = Path(__file__).parent / "native"


@functools.cache
def library() -> Any:
    return load_module(
        "reroute_emulated",
        [str(NATIVE / "reroute_emulated.cpp")],
        extra_cflags=[f"-I{NATIVE}", "-ffp-contract=off", "-O1"],
    )


@dataclass
class Emulated:
    """As an implementation's module, but of one launch plan (`sere_sglang.ops.dispatch`)."""

    plan: Plan

    def is_available(self, device_type: str) -> str | None:
        return None

    def build(self) -> None:
        library()

    def reroute_(
        self,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        table: LayerTable,
        control: torch.Tensor,
        row_class: torch.Tensor | None,
        counters: torch.Tensor | None,
        distinct: bool,
    ) -> None:
        library().reroute(
            *cuda.operands(topk_weights, topk_ids, table, control, row_class, counters, distinct),
            *cuda.launch_operands(self.plan, topk_ids.device, False),
        )


def fused(
    plan: Plan,
    logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    table: LayerTable,
    control: torch.Tensor,
    row_class: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    distinct: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.full((logits.shape[0], top_k), -1.0)
    ids = torch.full((logits.shape[0], top_k), -2, dtype=torch.int32)
    library().fused(
        logits,
        renormalize,
        *cuda.operands(weights, ids, table, control, row_class, counters, distinct),
        *cuda.launch_operands(plan, ids.device, False),
    )
    return weights, ids


@dataclass
class EmulatedRules:
    """As an implementation of rules beside ``similarity`` (`sere_sglang.ops.rules`)."""

    plan: Plan

    def apply(self, call: RuleCall, counters: torch.Tensor | None = None) -> Routed:
        return apply_copy(self.apply_, call, counters)

    def apply_(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor,
        scores: torch.Tensor | None,
        block: torch.Tensor,
        num_experts: int,
        *,
        expert_loss: torch.Tensor | None = None,
        row_class: torch.Tensor | None = None,
        counters: torch.Tensor | None = None,
        lost: LostSlots | None = None,
        active: torch.Tensor | None = None,
    ) -> None:
        library().rules(
            *(ids, weights, scores, block, num_experts, expert_loss, row_class, counters),
            *rules_cuda.outputs(lost, active),
            *rules_cuda.launch_operands(self.plan, ids.device, False),
        )


def fused_rule(
    plan: Plan,
    logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    block: torch.Tensor,
    expert_loss: torch.Tensor | None = None,
    row_class: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    lost: LostSlots | None = None,
) -> Selected:
    """As `sere_sglang.ops.cuda.rules_fused.fused_topk_rule`."""
    weights, ids = new_slots(logits, top_k)
    scores = torch.full(logits.shape, -1.0)
    library().rules_fused(
        *(logits, renormalize, ids.fill_(-2), weights.fill_(-1.0), scores, block),
        *(expert_loss, row_class, counters, *rules_cuda.outputs(lost, None)),
        *rules_cuda.launch_operands(plan, ids.device, False),
    )
    return Selected(weights, ids, scores)
