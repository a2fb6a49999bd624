"""What a GPU layer calls under a rule beside ``similarity``: torch ops of the Triton kernels.

Registered like ``sere::reroute_``, so that torch.compile sees opaque ops with declared mutation.
All read what to do on the device and may be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from sere_sglang.ops.checks import check_tensor
from sere_sglang.ops.counters import COUNTER_FIELDS
from sere_sglang.ops.rule_block import RULE_WORDS
from sere_sglang.ops.rules import load_rules
from sere_sglang.ops.rules_call import MAX_ROWS, LostSlots
from sere_sglang.ops.surrogates import Surrogates


def why_unavailable(device_type: str) -> str | None:
    """Why the ops cannot be had on a device, after building them; None if they can."""
    try:
        load_rules("triton", device_type)
    except RuntimeError as error:  # no Triton, or one that does not compile
        return str(error)
    return None


def apply_rule_(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    scores: torch.Tensor | None,
    block: torch.Tensor,
    num_experts: int,
    *,
    expert_loss: torch.Tensor | None = None,
    row_class: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    lost: LostSlots | None = None,
) -> None:
    """Apply in place the rule that `block` names on the device; none if it names ``similarity``.

    Args:
        topk_ids: int32 ``[T, K]``, mutated; unit stride within a row, T at most 8192.
        topk_weights: float32 ``[T, K]``, mutated, likewise.
        scores: float32 ``[T, E]`` (see `apply_rule`); without, no rule that takes them may be
            named.
        block: int32 ``[16]`` (`rule_block.encode_rule`).
        num_experts: E.
        expert_loss: float32 ``[E]``, as in `rules_check.checked`, looked at where the block asks
            for what rows lost; or None.
        row_class: uint8 ``[>= T]``, looked at where the block says that rows have classes.
        counters: int64 ``[7]`` to add to (`rules.Implementation`), or None.
        lost: `LostSlots.none`, written where the block asks for it, or None.

    Raises:
        ValueError: arguments that do not fit, naming the argument.
        RuntimeError: no Triton for this device.
    """
    torch.ops.sere.apply_rule_.default(
        topk_ids,
        topk_weights,
        scores,
        block,
        num_experts,
        expert_loss,
        row_class,
        counters,
        *(lost or (None, None)),
    )


def begin_compensation(
    hidden: torch.Tensor, lost: LostSlots, surrogates: Surrogates, share: float
) -> torch.Tensor:
    """What `add_compensation_` takes, from a layer's input ``[T, H]``, which the layer may then
    overwrite. share: of what the surrogates compute, this rank's, where ranks add outputs up."""
    return torch.ops.sere.begin_compensation.default(
        hidden, lost.weights, lost.experts, surrogates.inward, share
    )


def add_compensation_(
    output: torch.Tensor,
    inner: torch.Tensor,
    lost: LostSlots,
    surrogates: Surrogates,
    share: float,
) -> None:
    """output[t] += share * sum over lost slots of weight * (U_e V_e^T hidden[t] + b_e).

    output: floating ``[T, H]``, unit stride within a row; rows that lost nothing are not touched.
    """
    torch.ops.sere.add_compensation_.default(
        output, inner, lost.weights, lost.experts, surrogates.outward, surrogates.bias, share
    )


@functools.cache
def _module(name: str) -> Any:
    """Of Triton, which is imported where it is used only."""
    return importlib.import_module(f"sere_sglang.ops.{name}")


def _apply(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    scores: torch.Tensor | None,
    block: torch.Tensor,
    num_experts: int,
    expert_loss: torch.Tensor | None,
    row_class: torch.Tensor | None,
    counters: torch.Tensor | None,
    lost: torch.Tensor | None,
    lost_experts: torch.Tensor | None,
) -> None:
    check_apply(
        topk_ids, topk_weights, scores, block, num_experts, expert_loss, row_class, counters, lost,
        lost_experts,
    )  # fmt: skip
    implementation: Any = load_rules("triton", topk_ids.device.type)
    if topk_ids.numel() == 0:
        return
    slots = None if lost is None or lost_experts is None else LostSlots(lost, lost_experts)
    implementation.apply_(
        topk_ids,
        topk_weights,
        scores,
        block,
        num_experts,
        expert_loss=expert_loss,
        row_class=row_class,
        counters=counters,
        lost=slots,
    )


def check_apply(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    scores: torch.Tensor | None,
    block: torch.Tensor,
    num_experts: int,
    expert_loss: torch.Tensor | None,
    row_class: torch.Tensor | None,
    counters: torch.Tensor | None,
    lost: torch.Tensor | None,
    lost_experts: torch.Tensor | None,
) -> None:
    """Raises ValueError where arguments of `apply_rule_` do not fit, naming the argument."""
    if topk_ids.dim() != 2 or topk_ids.shape[0] > MAX_ROWS:
        raise ValueError(f"topk_ids must be [T <= {MAX_ROWS}, K], got {list(topk_ids.shape)}")
    shape = tuple(topk_ids.shape)
    check_tensor("topk_ids", topk_ids, torch.int32, shape, topk_ids, rows_apart=True)
    check_tensor("topk_weights", topk_weights, torch.float32, shape, topk_ids, rows_apart=True)
    check_tensor("block", block, torch.int32, (RULE_WORDS,), topk_ids)
    if scores is not None:
        check_tensor("scores", scores, torch.float32, (shape[0], num_experts), topk_ids)
    if expert_loss is not None:
        check_tensor("expert_loss", expert_loss, torch.float32, (num_experts,), topk_ids)
    if counters is not None:
        check_tensor("counters", counters, torch.int64, (len(COUNTER_FIELDS) + 1,), topk_ids)
    if row_class is not None:
        if row_class.dim() != 1 or row_class.shape[0] < shape[0]:
            raise ValueError(f"row_class must be [>= T={shape[0]}], got {list(row_class.shape)}")
        check_tensor("row_class", row_class, torch.uint8, tuple(row_class.shape), topk_ids)
    if lost is not None and lost_experts is not None:
        check_tensor("lost", lost, torch.float32, shape, topk_ids)
        check_tensor("lost_experts", lost_experts, torch.int32, shape, topk_ids)


def _check_rows(name: str, rows: torch.Tensor, lost: torch.Tensor, matrices: torch.Tensor) -> None:
    shape = (lost.shape[0], matrices.shape[2])
    if tuple(rows.shape) != shape or not rows.is_floating_point() or rows.stride(1) != 1:
        raise ValueError(
            f"{name} must be floating {list(shape)} with unit stride within a row, "
            f"got {rows.dtype} {list(rows.shape)}"
        )


def _begin(
    hidden: torch.Tensor,
    lost: torch.Tensor,
    experts: torch.Tensor,
    inward: torch.Tensor,
    share: float,
) -> torch.Tensor:
    _check_rows("hidden", hidden, lost, inward)
    return _module("triton.surrogates").inner_products(hidden, lost, experts, inward, share)


def _begin_fake(
    hidden: torch.Tensor,
    lost: torch.Tensor,
    experts: torch.Tensor,
    inward: torch.Tensor,
    share: float,
) -> torch.Tensor:
    return hidden.new_empty(*lost.shape, inward.shape[1], dtype=torch.float32)


def _add(
    output: torch.Tensor,
    inner: torch.Tensor,
    lost: torch.Tensor,
    experts: torch.Tensor,
    outward: torch.Tensor,
    bias: torch.Tensor,
    share: float,
) -> None:
    _check_rows("output", output, lost, outward)
    _module("triton.surrogates").add_(output, inner, lost, experts, outward, bias, share)


def _add_fake(
    output: torch.Tensor,
    inner: torch.Tensor,
    lost: torch.Tensor,
    experts: torch.Tensor,
    outward: torch.Tensor,
    bias: torch.Tensor,
    share: float,
) -> None: ...


_library = torch.library.Library("sere", "FRAGMENT")
_library.define(
    "apply_rule_(Tensor(a!) topk_ids, Tensor(b!) topk_weights, Tensor? scores, Tensor block, "
    "int num_experts, Tensor? expert_loss, Tensor? row_class, Tensor(c!)? counters, "
    "Tensor(d!)? lost, Tensor(e!)? lost_experts) -> ()"
)
_library.define(
    "begin_compensation(Tensor hidden, Tensor lost, Tensor experts, Tensor inward, "
    "float share) -> Tensor"
)
_library.define(
    "add_compensation_(Tensor(a!) output, Tensor inner, Tensor lost, Tensor experts, "
    "Tensor outward, Tensor bias, float share) -> ()"
)
for _name, _kernel, _fake in (
    ("apply_rule_", _apply, check_apply),
    ("begin_compensation", _begin, _begin_fake),
    ("add_compensation_", _add, _add_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sere::{_name}", _fake, lib=_library)
