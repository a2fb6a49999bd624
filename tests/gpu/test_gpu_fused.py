"""The fused form on a GPU: against the oracle, in graphs, and against SGLang's own router."""

from __future__ import annotations

import random

import pytest
import torch

from sere_sglang.ops import LayerTable, encode_control
from sere_sglang.ops.fused import fused_topk_reroute
from tests.gpu.shared import SIZES, capture
from tests.ops import cases, fused_cases
from tests.ops.cases import Spec

pytestmark = pytest.mark.gpu


def of(impl: str) -> fused_cases.Fused:
    return lambda logits, top_k, renormalize, table, control, row_class, counters: (
        fused_topk_reroute(
            logits,
            top_k,
            renormalize,
            table,
            control,
            row_class=row_class,
            counters=counters,
            impl=impl,
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 20, 33, 256, 1025])
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_sizes(
    num_experts: int, top_k: int, num_tokens: int, dtype: torch.dtype, fused_impl: str
) -> None:
    spec = Spec(
        seed=num_tokens,
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=top_k,
        classes=((1, 0.97),),
        num_valid=num_tokens - num_tokens // 5,
    )
    fused_cases.check(spec, dtype, of(fused_impl), "cuda")


def test_random_cases(fused_impl: str) -> None:
    rng = random.Random(4)
    for _ in range(100):
        fused_cases.check(cases.random_spec(rng, 400, 300), torch.bfloat16, of(fused_impl), "cuda")


@pytest.mark.parametrize("num_tokens", [16, 200, 3000])
def test_in_a_graph(num_tokens: int, fused_impl: str) -> None:
    """The captured launch follows the control block and the logits that later replays see."""
    spec = Spec(num_tokens=num_tokens, num_experts=128, top_k=8)
    case = cases.make_case(spec)
    table = LayerTable.build(case.similarity, device="cuda")
    control = encode_control(enabled=False, num_valid=-1, classes=[(1, 0.0)]).cuda()
    logits = torch.zeros(num_tokens, 128, dtype=torch.bfloat16, device="cuda")
    out: list[torch.Tensor] = []

    def step() -> None:
        out[:] = fused_topk_reroute(logits, 8, True, table, control, impl=fused_impl)

    graph = capture(step)
    for seed, (enabled, num_valid, primary_k) in enumerate(
        [(True, -1, 1), (False, -1, 1), (True, num_tokens // 2, 2), (True, 1, 3)]
    ):
        torch.manual_seed(seed)
        logits.copy_(torch.randn(num_tokens, 128))
        control.copy_(
            encode_control(enabled=enabled, num_valid=num_valid, classes=[(primary_k, 0.95)])
        )
        graph.replay()
        ids, weights = fused_cases.topk(logits.cpu(), 8, True)
        want = fused_cases.oracle.reroute(
            ids,
            weights.tolist(),
            case.similarity.tolist(),
            enabled=enabled,
            num_valid=num_valid,
            classes=[(primary_k, 0.95)],
            distinct=True,
        )
        assert out[1].tolist() == want.ids
        weights = torch.tensor(want.weights, dtype=torch.float64)
        torch.testing.assert_close(out[0].double().cpu(), weights, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("num_experts", [60, 64, 128, 512])
def test_switched_off_it_is_sglangs_router(num_experts: int, fused_impl: str) -> None:
    try:
        from sglang.srt.layers.moe import topk
    except Exception as error:  # of a stripped wheel or another GPU, it raises all sorts
        pytest.skip(f"SGLang's router cannot be imported here: {error}")
    torch.manual_seed(num_experts)
    table = LayerTable.build(torch.eye(num_experts), device="cuda")
    control = encode_control(enabled=False, num_valid=-1, classes=[(1, 0.0)]).cuda()
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(400, num_experts, device="cuda") * 2).to(dtype)
        # Of equal logits, some of SGLang's kernels take any.
        best = logits.float().topk(5, dim=-1).values
        logits = logits[(best[:, :-1] > best[:, 1:]).all(dim=-1)]
        hidden = torch.zeros(len(logits), 16, dtype=torch.bfloat16, device="cuda")
        for renormalize in (False, True):
            weights, ids = topk.fused_topk(hidden, logits, 4, renormalize)[:2]
            got_weights, got_ids = fused_topk_reroute(
                logits, 4, renormalize, table, control, impl=fused_impl
            )
            assert torch.equal(got_ids, ids.to(torch.int32))
            torch.testing.assert_close(got_weights, weights, rtol=1e-5, atol=1e-7)
