"""Chooses the kernels that ``benchmarks.layer`` builds its layers of, checking them first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import moe_layer, op_impls, sglang_moe
from benchmarks._timing import first_line
from benchmarks.grouped_gemm import fused_experts, fused_experts_loop
from benchmarks.moe_layer import Kernels
from sere_sglang.ops import LayerTable, encode_control, select_impl

MAX_ERROR = 2e-2  # relative, of bf16 results against float32 sums
OWN = "a plain grouped GEMM in Triton (benchmarks/grouped_gemm.py)"


def choose(device: str, gemm: str) -> tuple[Kernels, dict[str, str], list[str]]:
    """Returns the kernels, their names, and what should have been there but was not.

    gemm: ``auto`` (SGLang's if it works here), ``sglang`` or ``own``.
    """
    if device == "cpu":
        kernels = Kernels(moe_layer.torch_topk, None, fused_experts_loop)
        return kernels, {"gemm": "torch loop", "topk": "torch", "reroute": "reroute_"}, []
    failed: list[str] = []
    names: dict[str, str] = {}
    fused = _fused_topk(failed)
    names["reroute"] = (
        f"fused with top-k ({select_impl(device)})"
        if fused is not None
        else f"a launch of its own ({select_impl(device)})"
    )
    topk = _plain_topk(fused, names)
    experts = _experts(gemm, names, failed)
    return Kernels(topk, fused, experts), names, failed


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def _experts(gemm: str, names: dict[str, str], failed: list[str]) -> Callable[..., torch.Tensor]:
    """One that fails on a small case is not used; without SGLang there is nothing to fail."""
    if gemm in ("auto", "sglang"):
        try:
            experts, name = sglang_moe.load_fused_experts()
        except sglang_moe.Unavailable as error:
            names["gemm_note"] = str(error)
            if gemm == "sglang":
                failed.append(f"SGLang's fused MoE: {error}")
        else:
            try:
                _check_experts(experts)
                names["gemm"] = name
                return experts
            except Exception as error:
                names["gemm_note"] = first_line(error)
                failed.append(f"{name} does not work here: {first_line(error)}")
    _check_experts(fused_experts)
    names["gemm"] = OWN
    return fused_experts


def _check_experts(experts: Callable[..., torch.Tensor]) -> None:
    generator = torch.Generator(device="cuda").manual_seed(1)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device="cuda") * std
        return values.to(torch.bfloat16)

    for num_tokens in (3, 40):
        x = normal(num_tokens, 256)
        w1, w2 = normal(8, 256, 256, std=1 / 16), normal(8, 256, 128, std=128**-0.5)
        ids = torch.randint(0, 7, (num_tokens, 4), generator=generator, device="cuda")
        ids = ids.to(torch.int32)  # a token may name an expert twice, which is harder
        weights = torch.rand(num_tokens, 4, generator=generator, device="cuda")
        want = fused_experts_loop(x, w1, w2, weights, ids)
        error = relative_error(experts(x.clone(), w1, w2, weights, ids), want)
        if not error < MAX_ERROR:
            raise AssertionError(f"wrong result: relative error {error:.3f}")


def _fused_topk(failed: list[str]) -> Callable[..., Any] | None:
    try:
        return op_impls.load_fused()
    except Exception as error:
        failed.append(f"fused top-k and re-routing: {first_line(error)}")
        return None


def _plain_topk(
    fused: Callable[..., Any] | None, names: dict[str, str]
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    try:
        topk_softmax = sglang_moe.load_topk_softmax()
    except sglang_moe.Unavailable as error:
        names["topk_note"] = str(error)
    else:
        names["topk"] = "sgl_kernel.topk_softmax"
        return partial(_sgl_topk, topk_softmax)
    if fused is not None:
        names["topk"] = "the fused kernel with SERE disabled"
        return partial(_disabled_topk, fused)
    names["topk"] = "torch"
    return moe_layer.torch_topk


def _sgl_topk(
    topk_softmax: Callable[..., Any], logits: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.empty(logits.shape[0], top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(logits.shape[0], top_k, dtype=torch.int32, device=logits.device)
    topk_softmax(weights, ids, logits, renormalize)
    return weights, ids


_off: dict[int, tuple[Any, torch.Tensor]] = {}  # experts -> any table, a disabled control block


def _disabled_topk(
    fused: Callable[..., Any], logits: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    experts = logits.shape[1]
    if experts not in _off:
        control = encode_control(enabled=False, num_valid=-1, classes=[(1, 0.0)])
        table = LayerTable.build(torch.eye(experts), device=logits.device)
        _off[experts] = (table, control.to(logits.device))
    return fused(logits, top_k, renormalize, *_off[experts])
