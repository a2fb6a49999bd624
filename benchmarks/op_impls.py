"""What ``benchmarks.op`` compares: a name -> the calls of one size.

A call runs one step in place, so that it can be captured; what a call returns instead of writing to
``case.ids`` it leaves in ``case.results`` when it is the first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import published_sequence, sglang_moe
from benchmarks.op_cases import PRIMARY_K, THRESHOLD, OpCase
from sere_sglang.ops import reroute_
from sere_sglang.ops.dispatch import load_impl

Calls = list[Callable[[], object]]
MakeCalls = Callable[[OpCase, torch.Tensor], Calls]
RENORMALIZE = True


class Unavailable(RuntimeError):
    """Something that belongs in the comparison is not there; says what and why."""


def load_impls(device: str) -> tuple[dict[str, MakeCalls], list[Unavailable], dict[str, str]]:
    """Builds everything. Returns the implementations, what is missing, and notes on who is who.

    On the CPU (a dry run) other implementations stand in under the same names.
    """
    if device == "cpu":
        return _stand_ins(), [], {"dry_run": "CPU implementations stand in for all of them"}
    impls: dict[str, MakeCalls] = {}
    missing = []
    notes = {}
    for name in ("cuda", "triton"):
        try:
            load_impl(name, device)
            impls[name] = partial(_reroute, impl=name)
        except Exception as error:
            missing.append(Unavailable(f"{name}: {error}"))
    try:
        native = published_sequence.native_module("cuda")
        impls["published"] = _published
        impls["empty"] = lambda case, control: [lambda: native.empty(case.ids)] * case.calls
    except Exception as error:
        missing.append(Unavailable(f"published, empty: {error}"))
    try:
        from sere_sglang.ops.fused import fused_topk_reroute

        impls["fused"] = partial(_fused, fused_topk_reroute)
        notes["topk_only"] = "the fused kernel with SERE disabled"
    except Exception as error:
        missing.append(Unavailable(f"fused: {error}"))
    try:
        impls["topk_only"] = partial(_topk_only, sglang_moe.load_topk_softmax())
        notes["topk_only"] = "sgl_kernel.topk_softmax"
    except sglang_moe.Unavailable as error:
        if "fused" not in impls:
            missing.append(Unavailable(f"topk_only: {error}"))
    return impls, missing, notes


def _reroute(case: OpCase, control: torch.Tensor, *, impl: str) -> Calls:
    return [
        partial(
            reroute_,
            case.ids[i],
            case.weights[i],
            case.tables[i],
            control,
            counters=case.counters[i],
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
        "triton": partial(_reroute, impl="torch"),
        "fused": partial(_fused, topk_reroute),
        "published": _published,
        "topk_only": partial(_topk_only, softmax_topk),
        "empty": lambda case, control: [lambda: None] * case.calls,
    }
