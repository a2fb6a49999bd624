"""``impl="cuda"`` of `apply_rule`: the rules in CUDA C++ (``csrc/rules.cu``), one launch for decode
sizes.

``similarity`` has kernels of its own (cuda/reroute.py), to which this adds what `Routed` says.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sere_sglang.ops.cuda import library
from sere_sglang.ops.cuda.plan import Plan, plan_rule
from sere_sglang.ops.jit import BuildError
from sere_sglang.ops.reference import rules as reference
from sere_sglang.ops.rule_block import encode_rule
from sere_sglang.ops.rules_call import LostSlots, Routed, RuleCall
from sere_sglang.ops.rules_device import apply_copy

is_available = library.is_available

SCRATCH_BYTES = 9216  # at least sizeof(RuleScratch)


@functools.cache
def build() -> None:
    """Compile, and launch once: a driver too old for the compiler shows only then."""
    device = torch.device("cuda", torch.cuda.current_device())
    library.load_function("rules")
    ids = torch.zeros(1, 2, dtype=torch.int32, device=device)
    switched_off = encode_rule("similarity").to(device)
    try:
        apply_(ids, torch.ones(1, 2, device=device), None, switched_off, 2)
    except RuntimeError as error:
        raise BuildError(f"the rules were built but do not launch: {error}") from error


def apply(call: RuleCall, counters: torch.Tensor | None = None) -> Routed:
    """See `Implementation.apply`."""
    if call.rule == "similarity":
        return reference.apply(call, counters, reroute_impl="cuda")
    return apply_copy(apply_, call, counters)


def apply_(
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
    """See `rules_device.ApplyInPlace`."""
    overlaps = library.has_clusters(ids.device)
    plan = plan_rule(ids.shape[0], num_experts, overlaps)
    operands = (ids, weights, scores, block, num_experts, expert_loss, row_class, counters)
    library.load_function("rules")(
        *operands, *outputs(lost, active), *launch_operands(plan, ids.device, overlaps)
    )


def outputs(lost: LostSlots | None, active: torch.Tensor | None) -> tuple[Any, ...]:
    """What the native function writes besides the rows, in its order."""
    return (*(lost or (None, None)), active)


def launch_operands(plan: Plan, device: torch.device, overlaps: bool) -> tuple[Any, ...]:
    """The last arguments of the native function, as `cuda.reroute.launch_operands`."""
    scratch = library.grid_scratch(plan, device, SCRATCH_BYTES)
    return scratch, int(plan.form), plan.blocks, plan.threads, overlaps
