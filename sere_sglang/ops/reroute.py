"""The two entry points: `reroute` for any caller, `reroute_` for the serving layer.

Both go through the torch custom op ``sere::reroute_``, so that torch.compile sees one opaque op
with declared mutation.
"""

from __future__ import annotations

import numbers

import torch

from sere_sglang.ops import control as ctl
from sere_sglang.ops.checks import check_tensor, whole_number
from sere_sglang.ops.counters import COUNTER_FIELDS
from sere_sglang.ops.dispatch import load_impl, select_impl
from sere_sglang.ops.table import MAX_EXPERTS, LayerTable

MAX_TOP_K = 32


def reroute(
    topk_ids: torch.Tensor,
    similarity: torch.Tensor,
    *,
    primary_k: int,
    threshold: float = 0.0,
    topk_weights: torch.Tensor | None = None,
    num_valid: int | None = None,
    protected: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Re-route one layer's expert choices onto the batch's primary experts.

    Args:
        topk_ids: int32 or int64 ``[T, K]``; -1 marks an empty slot.
        similarity: floating ``[E, E]``, on the same device; compared as float32.
        primary_k: S; a token's S heaviest slots keep their experts and vote for P. S <= 0 or
            S >= K changes nothing.
        threshold: rho in [0, 1]; a slot whose best primary is less similar keeps its expert.
        topk_weights: floating ``[T, K]`` to rank the slots by; None if they are already ranked.
        num_valid: rows from this one on are padding and take over active experts; None for none.
        protected: bool ``[T]``; such a row votes with every slot and is left as it is.
        impl: ``auto``, ``torch``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        int32 ``[T, K]``, new. The rules are those of docs/semantics.md.

    Raises:
        ValueError, TypeError: arguments that do not fit, naming the argument.
        RuntimeError: `impl` does not serve this device or does not build here.
    """
    given = {"topk_ids": topk_ids, "similarity": similarity}
    given |= {"topk_weights": topk_weights} if topk_weights is not None else {}
    given |= {"protected": protected} if protected is not None else {}
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != topk_ids.device:
            raise ValueError(f"{name} is on {tensor.device}, topk_ids on {topk_ids.device}")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if topk_ids.dim() != 2:
        raise ValueError(f"topk_ids must be [T, K], got {list(topk_ids.shape)}")
    primary_k = whole_number("primary_k", primary_k)
    num_valid = None if num_valid is None else whole_number("num_valid", num_valid)
    if not isinstance(threshold, numbers.Real):
        raise TypeError(f"threshold must be a number, got {type(threshold).__name__}")
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if not similarity.is_floating_point():
        raise TypeError(f"similarity must be floating point, got {similarity.dtype}")
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity must be square [E, E], got {list(similarity.shape)}")
    num_tokens, top_k = topk_ids.shape
    if num_valid is not None and not 0 <= num_valid <= num_tokens:
        raise ValueError(f"num_valid must be in [0, T={num_tokens}], got {num_valid}")
    if protected is not None and (
        protected.dtype != torch.bool or list(protected.shape) != [num_tokens]
    ):
        raise ValueError(
            f"protected must be bool [T={num_tokens}], "
            f"got {protected.dtype} {list(protected.shape)}"
        )
    _check_values_on_cpu(topk_ids, topk_weights, similarity)

    ids = topk_ids.to(torch.int32, copy=True, memory_format=torch.contiguous_format)
    # With several classes the control block reads S <= 0 as 1, so this is decided here.
    enabled = 0 < primary_k < top_k
    classes = [(primary_k if enabled else 0, threshold)]
    row_class = None
    if protected is not None:
        classes.append((top_k, 0.0))
        row_class = protected.to(torch.uint8)
    if topk_weights is not None:
        if not topk_weights.is_floating_point():
            raise TypeError(f"topk_weights must be floating point, got {topk_weights.dtype}")
        topk_weights = topk_weights.to(torch.float32).contiguous()
    control = ctl.encode_control(
        enabled=enabled, num_valid=-1 if num_valid is None else num_valid, classes=classes
    )
    table = LayerTable(similarity.detach().to(torch.float32).contiguous())
    reroute_(
        ids,
        topk_weights,
        table,
        control.to(ids.device),
        row_class=row_class,
        distinct=False,
        impl=impl,
    )
    return ids


def reroute_(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    table: LayerTable,
    control: torch.Tensor,
    *,
    row_class: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    distinct: bool = True,
    impl: str = "auto",
) -> None:
    """Re-route in place, at the operating point that `control` holds on the device.

    Args:
        topk_ids: int32 ``[T, K]``, mutated; unit stride within a row.
        topk_weights: float32 ``[T, K]``, mutated; None only with ``distinct=False``, where the
            slots are ranked already.
        table: from `LayerTable.build`, on the same device.
        control: int32 ``[16]`` (`encode_control`), on the same device.
        row_class: uint8 ``[>= T]`` or None (every row is of class 0); values beyond the block's
            classes are read as the last class.
        counters: int64 ``[6]`` to add to (`COUNTER_FIELDS`), or None.
        distinct: slots of a row that meet on one expert become one, with the weight of all, and a
            freed slot gets another active expert at weight 0 (docs/semantics.md, rule 8): the
            layer computes the same sum, and no runner sees an expert twice in a row. Without, ids
            are what rules 1 to 7 say, and weights change only by ``table.scale``.
        impl: ``auto``, ``torch``, ``cpu``, ``triton`` or ``cuda``.

    Raises:
        ValueError: arguments that do not fit, naming the argument.
    """
    if distinct and topk_weights is None:
        raise ValueError("topk_weights is missing: distinct rows need it; or say distinct=False")
    torch.ops.sere.reroute_.default(
        topk_ids,
        topk_weights,
        table.similarity,
        table.neighbors,
        table.scale,
        control,
        row_class,
        counters,
        distinct,
        impl,
    )


def _check_values_on_cpu(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor | None, similarity: torch.Tensor
) -> None:
    """Value checks, only where reading values does not synchronize a device."""
    if topk_ids.device.type != "cpu" or topk_ids.numel() == 0:
        return
    num_experts = similarity.shape[0]
    lowest, highest = (int(end) for end in torch.aminmax(topk_ids))
    if lowest < -1 or highest >= num_experts:
        raise ValueError(
            f"topk_ids must be -1 or in [0, E={num_experts}), found {lowest} to {highest}"
        )
    if topk_weights is not None and bool(torch.isnan(topk_weights).any()):
        raise ValueError("topk_weights contains NaN")
    if not bool(torch.isfinite(similarity).all()):
        raise ValueError("similarity contains NaN or infinity")


def _op(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    similarity: torch.Tensor,
    neighbors: torch.Tensor | None,
    scale: torch.Tensor | None,
    control: torch.Tensor,
    row_class: torch.Tensor | None,
    counters: torch.Tensor | None,
    distinct: bool,
    impl: str,
) -> None:
    table = LayerTable(similarity, neighbors, scale)
    check_arguments(topk_ids, topk_weights, table, control, row_class, counters)
    device_type = topk_ids.device.type
    name = select_impl(device_type) if impl == "auto" else impl
    implementation = load_impl(name, device_type)
    if topk_ids.numel() > 0:
        implementation.reroute_(
            topk_ids, topk_weights, table, control, row_class, counters, distinct
        )


def _op_fake(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    similarity: torch.Tensor,
    neighbors: torch.Tensor | None,
    scale: torch.Tensor | None,
    control: torch.Tensor,
    row_class: torch.Tensor | None,
    counters: torch.Tensor | None,
    distinct: bool,
    impl: str,
) -> None:
    table = LayerTable(similarity, neighbors, scale)
    check_arguments(topk_ids, topk_weights, table, control, row_class, counters)


def check_arguments(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    table: LayerTable,
    control: torch.Tensor,
    row_class: torch.Tensor | None,
    counters: torch.Tensor | None,
) -> None:
    if topk_ids.dim() != 2:
        raise ValueError(f"topk_ids must be [T, K], got {list(topk_ids.shape)}")
    num_tokens, top_k = topk_ids.shape
    num_experts = table.similarity.shape[0]
    if num_experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        raise ValueError(
            f"at most {MAX_EXPERTS} experts and top-{MAX_TOP_K} are supported, "
            f"got E={num_experts}, K={top_k}"
        )
    square = (num_experts, num_experts)
    check_tensor("topk_ids", topk_ids, torch.int32, (num_tokens, top_k), topk_ids, rows_apart=True)
    check_tensor("similarity", table.similarity, torch.float32, square, topk_ids)
    check_tensor("control", control, torch.int32, (ctl.CONTROL_WORDS,), topk_ids)
    if topk_weights is not None:
        check_tensor(
            "topk_weights",
            topk_weights,
            torch.float32,
            (num_tokens, top_k),
            topk_ids,
            rows_apart=True,
        )
    if table.neighbors is not None:
        check_tensor("neighbors", table.neighbors, torch.int16, square, topk_ids)
    if table.scale is not None:
        check_tensor("scale", table.scale, torch.float32, square, topk_ids)
    if counters is not None:
        check_tensor("counters", counters, torch.int64, (len(COUNTER_FIELDS),), topk_ids)
    if row_class is not None:
        if row_class.dim() != 1 or row_class.shape[0] < num_tokens:
            raise ValueError(f"row_class must be [>= T={num_tokens}], got {list(row_class.shape)}")
        check_tensor("row_class", row_class, torch.uint8, tuple(row_class.shape), topk_ids)


_library = torch.library.Library("sere", "FRAGMENT")
_library.define(
    "reroute_(Tensor(a!) topk_ids, Tensor(b!)? topk_weights, Tensor similarity, "
    "Tensor? neighbors, Tensor? scale, Tensor control, Tensor? row_class, "
    "Tensor(c!)? counters, bool distinct, str impl) -> ()"
)
_library.impl("reroute_", _op, "CompositeExplicitAutograd")
torch.library.register_fake("sere::reroute_", _op_fake, lib=_library)
