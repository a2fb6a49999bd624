"""The CPU MoE runner: one layer's experts over plain tensors. Needs no SGLang.

Its time follows the number of active experts. A slot of weight 0, as re-routing leaves one where
slots met, costs nothing and loads no expert.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sere_sglang.cpu import isa as cpu_isa
from sere_sglang.cpu.isa import ISAS, isa
from sere_sglang.cpu.packed import PackedExperts
from sere_sglang.ops.jit import BuildError, build_library, cxx_flags, find_cxx, load_module
from sere_sglang.ops.surrogates import Compensation

logger = logging.getLogger(__name__)

__all__ = ["fused_moe", "fused_moe_packed", "isa", "native_module", "pack_experts"]

ACTIVATIONS = {"silu": 0, "gelu": 1}
"""Name -> code in ``csrc/cpu_moe_common.h``; gelu is the tanh form, as SGLang's experts use it."""

IMPLEMENTATIONS = ("auto", "native", "torch")

_SOURCES = ("cpu_moe.cpp",)

_NOTHING_LOST = (None, None, None, None, 0.0)
"""In the place of `Compensation.operands`."""


def fused_moe(
    hidden: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    activation: str = "silu",
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    compensation: Compensation | None = None,
    impl: str = "auto",
    isa: str | None = None,
) -> torch.Tensor:
    """Sum over each token's slots of weight * down(act(gate(x)) * up(x)).

    Args:
        hidden: bfloat16 or float32 ``[T, H]``.
        w13: same dtype ``[E, 2I, H]``, gate rows then up rows (SGLang's unquantized layout).
        w2: same dtype ``[E, H, I]``.
        topk_ids: int32 or int64 ``[T, K]``; a negative id is an empty slot; an expert may fill
            several slots of a row.
        topk_weights: ``[T, K]``, applied in float32; a slot of weight 0 is empty too.
        activation: ``silu`` or ``gelu`` (tanh form).
        w13_bias, w2_bias: ``[E, 2I]``, ``[E, H]`` or None.
        compensation: what the rows lost of experts that are not among their slots; added in
            float32.
        impl: ``native`` is compiled, ``torch`` is one matmul pair per active expert, ``auto``
            is native where it compiles. Native kernels do not read rows, but for AMX: weights are
            packed at every call, which takes longer than all the rest. `pack_experts` does it once.
        isa: a name of `cpu_isa.ISAS` for the native code, the one in use if None.

    Returns:
        ``[T, H]`` in the dtype of `hidden`; products accumulate in float32.

    Raises:
        ValueError: arguments that do not fit.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}; choose one of: {', '.join(IMPLEMENTATIONS)}")
    _check_weights(hidden, w13, w2)
    _check_call(hidden, topk_ids, topk_weights, activation, compensation)
    if impl == "auto":
        impl = "torch" if _native_or_none() is None else "native"
    if impl == "native":
        experts = PackedExperts.pack(native_module(isa), w13, w2, in_place=False)
        how: dict[str, Any] = {"w13_bias": w13_bias, "w2_bias": w2_bias}
        how |= {"activation": activation, "compensation": compensation}
        return fused_moe_packed(hidden, experts, topk_ids, topk_weights, **how)
    ids, weights = topk_ids.to(torch.int32), topk_weights.to(torch.float32)
    out = _fused_moe_torch(hidden, w13, w2, ids, weights, activation, w13_bias, w2_bias)
    return (out if compensation is None else out + compensation.of(hidden)).to(hidden.dtype)


def pack_experts(w13: torch.Tensor, w2: torch.Tensor) -> PackedExperts | None:
    """Weights as `fused_moe` takes them, for `fused_moe_packed`; None where nothing compiles.

    The rows change places within the tensors, and `PackedExperts.unpack` puts them back.
    """
    module = _native_or_none()
    return None if module is None else PackedExperts.pack(module, w13, w2, in_place=True)


def fused_moe_packed(
    hidden: torch.Tensor,
    experts: PackedExperts,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    activation: str = "silu",
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    compensation: Compensation | None = None,
) -> torch.Tensor:
    """`fused_moe` of weights that were packed before."""
    if hidden.dim() != 2 or hidden.shape[1] != experts.hidden_size:
        wanted = f"[T, H={experts.hidden_size}]"
        raise ValueError(f"hidden must be {wanted}, got {list(hidden.shape)}")
    if hidden.dtype != experts.w2.dtype:
        raise ValueError(f"weights are {experts.w2.dtype}, hidden is {hidden.dtype}")
    _check_call(hidden, topk_ids, topk_weights, activation, compensation)
    hidden = hidden.contiguous()
    out = torch.empty_like(hidden)
    # Conversions that change nothing take a microsecond each.
    if topk_ids.dtype != torch.int32:
        topk_ids = topk_ids.to(torch.int32)
    if topk_weights.dtype != torch.float32:
        topk_weights = topk_weights.to(torch.float32)
    experts.module.fused_moe(
        hidden,
        experts.w13,
        experts.w2,
        None if w13_bias is None else w13_bias.to(torch.float32).contiguous(),
        None if w2_bias is None else w2_bias.to(torch.float32).contiguous(),
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        out,
        experts.inter_size,
        ACTIVATIONS[activation],
        *(_NOTHING_LOST if compensation is None else compensation.operands),
    )
    return out


def native_module(isa: str | None = None) -> Any:
    """The kernels for an instruction set that runs here; compiles them the first time.

    Raises `BuildError`, and `SereError` where ``SERE_CPU_ISA`` asks for what does not run here.
    """
    return _native_module(isa or cpu_isa.isa())


def compile_for(isa: str) -> Path:
    """Put into the cache what `native_module` will look for on a machine that executes `isa`.

    Nothing is loaded. Raises `BuildError`.
    """
    compiler = find_cxx()
    flags = cxx_flags(compiler, ISAS[isa].cflags)
    return build_library(f"cpu_moe_{isa}", _SOURCES, compiler, flags)


@functools.cache
def _native_module(isa: str) -> Any:
    module = load_module(f"cpu_moe_{isa}", _SOURCES, tune=ISAS[isa].cflags)
    if not module.prepare_process():
        raise BuildError(f"the system does not let this process use {isa}")
    return module


@functools.cache
def _native_or_none() -> Any:
    try:
        return native_module()
    except BuildError as error:
        logger.warning("the CPU MoE kernel does not build, torch matmuls replace it: %s", error)
        return None


def _check_weights(hidden: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> None:
    if hidden.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"hidden must be bfloat16 or float32, got {hidden.dtype}")
    for name, weight in (("w13", w13), ("w2", w2)):
        if weight.dtype != hidden.dtype:
            raise ValueError(f"{name} is {weight.dtype}, hidden is {hidden.dtype}")
        if weight.dim() != 3 or not weight.is_contiguous():
            raise ValueError(f"{name} must be contiguous with three dimensions")
    num_experts, hidden_size, inter_size = w2.shape
    if hidden.dim() != 2 or hidden.shape[1] != hidden_size:
        raise ValueError(f"hidden must be [T, H={hidden_size}], got {list(hidden.shape)}")
    if list(w13.shape) != [num_experts, 2 * inter_size, hidden_size]:
        raise ValueError(f"w13 {list(w13.shape)} does not fit w2 {list(w2.shape)}")


def _check_call(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    activation: str,
    compensation: Compensation | None,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation {activation!r} is not supported; choose one of: {', '.join(ACTIVATIONS)}"
        )
    if topk_ids.dim() != 2 or topk_ids.shape[0] != hidden.shape[0]:
        raise ValueError(f"topk_ids must be [T={hidden.shape[0]}, K], got {list(topk_ids.shape)}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights {list(topk_weights.shape)} does not fit topk_ids {list(topk_ids.shape)}"
        )
    if compensation is not None:
        compensation.check(*hidden.shape)


def _fused_moe_torch(
    hidden: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
) -> torch.Tensor:
    """float32: one pair of matmuls per active expert, over its gathered rows."""
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    flat = ids.where(weights != 0, -1).flatten()
    order = flat.argsort(stable=True)
    experts, counts = flat[order].unique_consecutive(return_counts=True)
    tokens = order // max(1, ids.shape[1])
    weight_of = weights.flatten()[order]
    begin = 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        rows, row_weights = tokens[begin : begin + count], weight_of[begin : begin + count]
        begin += count
        if expert < 0:
            continue
        gate_up = F.linear(hidden[rows], w13[expert]).float()
        if w13_bias is not None:
            gate_up += w13_bias[expert]
        gate, up = gate_up.chunk(2, dim=-1)
        gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        expert_out = F.linear((gate * up).to(hidden.dtype), w2[expert]).float()
        if w2_bias is not None:
            expert_out += w2_bias[expert]
        out.index_add_(0, rows, expert_out * row_weights[:, None])
    return out
