"""The fused form's torch path, its argument checks and its custom op."""

from __future__ import annotations

import random

import pytest
import torch

from sere_sglang.ops import LayerTable, encode_control, fused, reroute_
from sere_sglang.ops.fused import fused_topk_reroute, softmax_topk
from sere_sglang.ops.jit import BuildError
from sere_sglang.ops.registry import UnavailableError
from tests.ops import cases, fused_cases
from tests.ops.cases import Spec

TABLE = LayerTable.build(torch.eye(8))
CONTROL = encode_control(enabled=True, num_valid=-1, classes=[(1, 0.0)])
LOGITS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_equals_the_oracle(name: str) -> None:
    def run(
        logits: torch.Tensor, top_k: int, renormalize: bool, table: LayerTable, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        control, row_class, counters = rest
        return fused_topk_reroute(
            logits,
            top_k,
            renormalize,
            table,
            control,
            row_class=row_class,
            counters=counters,
            impl=name,
        )

    rng = random.Random(2)
    for _ in range(80):
        dtype = rng.choice(fused.LOGIT_DTYPES)
        fused_cases.check(cases.random_spec(rng, 60, 100), dtype, run)


def test_rows_as_they_come() -> None:
    """Without distinct rows: rules 1 to 7 on what top-k gives."""
    case = cases.make_case(Spec(num_experts=8, top_k=4))
    table = LayerTable.build(case.similarity)
    want_weights, want = softmax_topk(LOGITS, 4, renormalize=True)
    reroute_(want, want_weights, table, CONTROL, distinct=False)
    weights, ids = fused_topk_reroute(LOGITS, 4, True, table, CONTROL, distinct=False)
    assert torch.equal(ids, want) and torch.equal(weights, want_weights)
    assert any(len(set(row)) < 4 for row in ids.tolist())
    _, distinct = fused_topk_reroute(LOGITS, 4, True, table, CONTROL)
    assert all(len(set(row)) == 4 for row in distinct.tolist())


def test_equal_logits_rank_by_expert_and_nan_ranks_last() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, float("nan")], [-0.0, 0.0, -1e20, float("-inf")]])
    weights, ids = softmax_topk(logits, 3, renormalize=False)
    assert ids.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert weights.isfinite().all()


def test_no_rows() -> None:
    weights, ids = fused_topk_reroute(LOGITS[:0], 2, True, TABLE, CONTROL)
    assert weights.shape == ids.shape == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_logits": LOGITS[:, :7]}, r"router_logits must be \[T, E=8\]"),
        ({"router_logits": LOGITS.double()}, "router_logits must be one of"),
        ({"router_logits": torch.zeros(8, 4).T}, "unit stride"),
        ({"top_k": 9}, "at most E=8, got 9"),
        ({"top_k": 0}, "top_k must be 1 to 32"),
        ({"control": CONTROL[:8]}, "control must be"),
        ({"impl": "triton"}, "choose one of: auto, torch, cuda"),
    ],
)
def test_names_the_argument_that_does_not_fit(changes: dict[str, object], message: str) -> None:
    arguments = {
        "router_logits": LOGITS,
        "top_k": 2,
        "renormalize": True,
        "table": TABLE,
        "control": CONTROL,
    }
    with pytest.raises(ValueError, match=message):
        fused_topk_reroute(**{**arguments, **changes})  # type: ignore[arg-type]


def test_cuda_does_not_serve_cpu_tensors() -> None:
    with pytest.raises(UnavailableError, match="serves CUDA tensors, not cpu"):
        fused_topk_reroute(LOGITS, 2, True, TABLE, CONTROL, impl="cuda")


def test_a_failing_build_falls_back_with_the_compilers_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise BuildError("fused does not compile: error: expected ';'")

    monkeypatch.setattr(fused, "select_impl", lambda device, strict=False: "cuda")
    monkeypatch.setattr(fused, "build", broken)
    fused.uses_cuda.cache_clear()
    assert not fused.uses_cuda()
    assert "expected ';'" in caplog.text
    with pytest.raises(BuildError, match="expected ';'"):
        fused.uses_cuda(strict=True)
    fused.uses_cuda.cache_clear()


def test_torch_checks_the_custom_op() -> None:
    case = cases.make_case(Spec(num_experts=8, top_k=2))
    table = LayerTable.build(case.similarity)
    counters = torch.zeros(6, dtype=torch.int64)
    operands = (LOGITS, 2, True, table.similarity, table.neighbors, None, CONTROL)
    torch.library.opcheck(
        torch.ops.sere.fused_topk_reroute.default,
        (*operands, None, counters, True, "torch"),
        test_utils=("test_schema", "test_faketensor"),
    )
