"""Inputs of the fused form and its check: top-k by the definition, then the oracle.

Shared by the tests here and under ``tests/gpu``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from sere_sglang.ops import COUNTER_FIELDS, LayerTable, encode_control
from tests.ops import cases, oracle
from tests.ops.cases import Spec

Fused = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""(logits, top_k, renormalize, table, control, row_class, counters) -> weights, ids"""


def emulated_at(plan: object) -> Fused:
    from tests.ops import emulated

    return lambda *arguments: emulated.fused(plan, *arguments)


def make_logits(spec: Spec, dtype: torch.dtype) -> torch.Tensor:
    """``[T, E]`` with ties where the spec has them, in rows further apart for extra columns."""
    generator = torch.Generator().manual_seed(spec.seed + 1)
    shape = (spec.num_tokens, spec.num_experts + spec.extra_columns)
    logits = torch.randn(shape, generator=generator) * 3
    if spec.weight_levels:
        logits = (logits * spec.weight_levels / 3).round()
    return logits.to(dtype)[:, : spec.num_experts]


def topk(
    logits: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[list[list[int]], torch.Tensor]:
    """Ids by logit, lowest first on a tie; weights in float64."""
    rows = logits.float().tolist()
    ids = [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:top_k] for row in rows]
    chosen = torch.tensor(ids, dtype=torch.int64).view(len(rows), top_k)
    weights = logits.double().softmax(dim=-1).gather(1, chosen)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids, weights


def check(spec: Spec, dtype: torch.dtype, fused: Fused, device: str = "cpu") -> None:
    spec = replace(spec, ranked=True)
    case = cases.make_case(spec)
    logits = make_logits(spec, dtype)
    renormalize = spec.seed % 2 == 0
    ids, weights = topk(logits, spec.top_k, renormalize)
    want = oracle.reroute(
        ids,
        weights.tolist(),
        case.similarity.tolist(),
        enabled=spec.enabled,
        num_valid=spec.num_valid,
        classes=case.classes,
        row_class=None if case.row_class is None else case.row_class.tolist(),
        scale=None if case.scale is None else case.scale.tolist(),
        distinct=True,
    )
    weights = torch.tensor(want.weights, dtype=torch.float64).view(weights.shape)

    table = LayerTable.build(case.similarity, case.scale, device=device)
    if not spec.neighbors:
        table = LayerTable(table.similarity, None, table.scale)
    control = encode_control(enabled=spec.enabled, num_valid=spec.num_valid, classes=case.classes)
    counters = torch.full((len(COUNTER_FIELDS),), 1000, dtype=torch.int64, device=device)
    if spec.num_tokens == 0:
        return
    got_weights, got_ids = fused(
        logits.to(device) if not spec.extra_columns else _apart(logits, device),
        spec.top_k,
        renormalize,
        table,
        control.to(device),
        None if case.row_class is None else case.row_class.to(device),
        counters,
    )
    label = f"{spec} {dtype}"
    assert got_ids.dtype == torch.int32 and got_weights.dtype == torch.float32
    assert got_ids.tolist() == want.ids, label
    torch.testing.assert_close(
        got_weights.double().cpu(), weights, rtol=2e-6, atol=1e-7, msg=lambda m: f"{label}: {m}"
    )
    added = dict(zip(COUNTER_FIELDS, (counters - 1000).tolist(), strict=True))
    assert added == want.counters, label


def _apart(logits: torch.Tensor, device: str) -> torch.Tensor:
    """The same values, in rows further apart than E."""
    wide = torch.zeros(logits.shape[0], logits.shape[1] + 3, dtype=logits.dtype, device=device)
    wide[:, : logits.shape[1]] = logits.to(device)
    return wide[:, : logits.shape[1]]
