"""What ``benchmarks.op`` compares: a name -> the calls of one size.

A call runs one step in place, so that it can be captured; what a call returns instead of writing to
``case.ids`` it leaves in ``case.results`` when it is the first.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch

from benchmarks import published_sequence, sglang_moe
from benchmarks.op_cases import PRIMARY_K, THRESHOLD, OpCase
from sere_sglang.ops import LayerTable, encode_control, reroute_
from sere_sglang.ops.dispatch import load_impl

Calls = list[Callable[[], object]]
MakeCalls = Callable[[OpCase, torch.Tensor], Calls]
NAMES = ("cuda", "repeated", "triton", "published", "empty", "fused", "topk_only")
"""``repeated`` is ``cuda`` that leaves an expert twice in a row: what distinct rows cost."""
RENORMALIZE = True


class Unavailable(RuntimeError):
    """Something that belongs in the comparison is not there; says what and why."""


def load_impls(
    device: str, names: Container[str] = NAMES
) -> tuple[dict[str, MakeCalls], list[Unavailable], dict[str, str]]:
    """Builds those named. Returns them, what is missing, and notes on who is who.

    On the CPU (a dry run) other implementations stand in under the same names.
    """
    if device == "cpu":
        stand_ins = {name: calls for name, calls in _stand_ins().items() if name in names}
        return stand_ins, [], {"dry_run": "CPU implementations stand in for all of them"}
    loaders: dict[str, Callable[[], MakeCalls]] = {
        "cuda": lambda: _load_reroute("cuda"),
        "repeated": lambda: _load_reroute("cuda", distinct=False),
        "triton": lambda: _load_reroute("triton"),
        "published": _load_published,
        "empty": _load_empty,
        "fused": lambda: partial(_fused, load_fused()),
        "topk_only": lambda: partial(_topk_only, sglang_moe.load_topk_softmax()),
    }
    impls: dict[str, MakeCalls] = {}
    missing = []
    for name, load in loaders.items():
        if name not in names:
            continue
        try:
            impls[name] = load()
        except Exception as error:
            if name != "topk_only" or "fused" not in impls:  # which then stands in for it
                missing.append(Unavailable(f"{name}: {error}"))
    source = (
        "sgl_kernel.topk_softmax" if "topk_only" in impls else "the fused kernel, SERE disabled"
    )
    return impls, missing, {"topk_only": source}


def _load_reroute(impl: str, distinct: bool = True) -> MakeCalls:
    load_impl(impl, "cuda")
    return partial(_reroute, impl=impl, distinct=distinct)


def _load_published() -> MakeCalls:
    published_sequence.native_module("cuda")
    return _published


def _load_empty() -> MakeCalls:
    empty = published_sequence.native_module("cuda").empty
    return lambda case, control: [partial(empty, case.ids)] * case.calls


def load_fused() -> Callable[..., Any]:
    """``fused_topk_reroute`` on its CUDA kernel, tried out."""
    from sere_sglang.ops.fused import fused_topk_reroute

    fused = partial(fused_topk_reroute, impl="cuda")
    table = LayerTable.build(torch.eye(16), device="cuda")
    control = encode_control(enabled=True, num_valid=-1, classes=[(1, 0.0)]).to("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        fused(torch.randn(4, 16, device="cuda").to(dtype), 4, RENORMALIZE, table, control)
    torch.cuda.synchronize()
    return fused


def _reroute(case: OpCase, control: torch.Tensor, *, impl: str, distinct: bool = True) -> Calls:
    return [
        partial(
            reroute_,
            case.ids[i],
            case.weights[i],
            case.tables[i],
            control,
            counters=case.counters[i],
            distinct=distinct,
            impl=impl,
        )
        for i in range(case.calls)
    ]


def _published(case: OpCase, control: torch.Tensor) -> Calls:
    run = published_sequence.run_native
    return [
        partial(run, case.ids[i], case.tables[i].similarity, PRIMARY_K, THRESHOLD)
        for i in range(case.calls)
    ]


def _fused(fused: Callable[..., Any], case: OpCase, control: torch.Tensor) -> Calls:
    def call(i: int) -> None:
        _, ids = fused(
            case.logits[i],
            case.top_k,
            RENORMALIZE,
            case.tables[i],
            control,
            counters=case.counters[i],
        )
        if i == 0:
            case.results[0] = ids

    return [partial(call, i) for i in range(case.calls)]


def _topk_only(topk_softmax: Callable[..., Any], case: OpCase, control: torch.Tensor) -> Calls:
    return [
        partial(topk_softmax, case.weights[i], case.ids[i], case.logits[i], RENORMALIZE)
        for i in range(case.calls)
    ]


def _stand_ins() -> dict[str, MakeCalls]:
    def softmax_topk(
        weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, renormalize: bool
    ) -> None:
        chosen, chosen_ids = logits.softmax(dim=-1).topk(ids.shape[1], dim=-1)
        weights.copy_(chosen / chosen.sum(dim=-1, keepdim=True) if renormalize else chosen)
        ids.copy_(chosen_ids)

    def topk_reroute(
        logits: torch.Tensor,
        top_k: int,
        renormalize: bool,
        table: Any,
        control: torch.Tensor,
        *,
        counters: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights = logits.new_empty(logits.shape[0], top_k)
        ids = torch.empty(logits.shape[0], top_k, dtype=torch.int32)
        softmax_topk(weights, ids, logits, renormalize)
        reroute_(ids, weights, table, control, counters=counters, impl="torch")
        return weights, ids

    return {
        "cuda": partial(_reroute, impl="auto"),
        "repeated": partial(_reroute, impl="auto", distinct=False),
        "triton": partial(_reroute, impl="torch"),
        "fused": partial(_fused, topk_reroute),
        "published": _published,
        "topk_only": partial(_topk_only, softmax_topk),
        "empty": lambda case, control: [lambda: None] * case.calls,
    }
