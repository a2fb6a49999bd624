"""Softmax top-k and a rule beside ``similarity`` in one launch; the router is a plain softmax.

In CUDA C++ alone (``csrc/rules_fused.cu``), and no server calls it yet: theirs run Triton's rules
behind top-k (rule_ops.py).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from sere_sglang.ops.cuda import library
from sere_sglang.ops.cuda.plan import plan_rule
from sere_sglang.ops.cuda.rules import launch_operands, outputs
from sere_sglang.ops.fused import check_logits, new_slots
from sere_sglang.ops.jit import BuildError
from sere_sglang.ops.registry import UnavailableError
from sere_sglang.ops.rule_block import encode_rule
from sere_sglang.ops.rule_ops import check_apply
from sere_sglang.ops.rules_call import LostSlots


class Selected(NamedTuple):
    """A router's choices after a rule. T rows, K slots, E experts."""

    weights: torch.Tensor
    """float32 ``[T, K]``"""
    ids: torch.Tensor
    """int32 ``[T, K]``; as `Routed.ids`."""
    scores: torch.Tensor
    """float32 ``[T, E]``: the softmax, written where the rule takes it; else left as it was made,
    uninitialized."""


def fused_topk_rule(
    router_logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    block: torch.Tensor,
    *,
    expert_loss: torch.Tensor | None = None,
    row_class: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    lost: LostSlots | None = None,
) -> Selected:
    """Choose each token's experts by softmax of its logits, then do what `block` says.

    Args:
        router_logits: CUDA, ``[T, E]``, float32, bfloat16 or float16, unit stride within a row, T
            at most 8192. Equal logits rank by expert, lowest first, as in SGLang's router.
        top_k: K, experts per token, at most 32.
        renormalize: divide the K weights by their sum.
        block: int32 ``[16]`` (`rule_block.encode_rule`), on the same device; ``similarity`` leaves
            it at top-k.
        expert_loss, row_class, counters, lost: as `rule_ops.apply_rule_`.

    Raises:
        ValueError: arguments that do not fit, naming the argument.
        RuntimeError: no CUDA kernel for this device, or one that does not build here.
    """
    num_rows, num_experts = router_logits.shape[0], router_logits.shape[-1]
    check_logits(router_logits, top_k, num_experts)
    weights, ids = new_slots(router_logits, top_k)
    scores = torch.empty(num_rows, num_experts, dtype=torch.float32, device=ids.device)
    gone = lost or (None, None)
    check_apply(ids, weights, scores, block, num_experts, expert_loss, row_class, counters, *gone)
    reason = library.is_available(ids.device.type)
    if reason is not None:
        raise UnavailableError(f"fused top-k and rule: {reason}")
    build()
    selected = Selected(weights, ids, scores)
    if num_rows > 0:
        operands = (block, expert_loss, row_class, counters)
        _launch(router_logits, renormalize, selected, *operands, lost)
    return selected


@functools.cache
def build() -> None:
    """Compile, and launch once: a driver too old for the compiler shows only then."""
    device = torch.device("cuda", torch.cuda.current_device())
    library.load_function("rules_fused")
    logits = torch.zeros(1, 2, device=device)
    selected = Selected(*new_slots(logits, 1), torch.empty(1, 2, device=device))
    switched_off = encode_rule("similarity").to(device)
    try:
        _launch(logits, True, selected, switched_off, None, None, None, None)
    except RuntimeError as error:
        raise BuildError(f"rules_fused was built but does not launch: {error}") from error


def _launch(
    router_logits: torch.Tensor,
    renormalize: bool,
    to: Selected,
    block: torch.Tensor,
    expert_loss: torch.Tensor | None,
    row_class: torch.Tensor | None,
    counters: torch.Tensor | None,
    lost: LostSlots | None,
) -> None:
    overlaps = library.has_clusters(to.ids.device)
    plan = plan_rule(to.scores.shape[0], to.scores.shape[1], overlaps)
    library.load_function("rules_fused")(
        *(router_logits, renormalize, to.ids, to.weights, to.scores, block),
        *(expert_loss, row_class, counters),
        *outputs(lost, None),
        *launch_operands(plan, to.ids.device, overlaps),
    )
