"""A layer's re-routing under torch.compile, as ``--enable-torch-compile`` traces a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks._common import random_similarity
from sere_sglang.ops import COUNTER_FIELDS, LayerTable, available_impls
from sere_sglang.runtime.control import ControlBlock
from sere_sglang.runtime.stage import RerouteStage, Switch
from sere_sglang.schedule.point import OFF, OperatingPoint

EXPERTS, TOP_K, CALLS = 16, 4, 20


@pytest.fixture(autouse=True)
def _dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The server tests, which may run in this process too, switch it off by the environment."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with torch._dynamo.config.patch(disable=False):
        yield


@pytest.mark.parametrize("impl", available_impls("cpu"))
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_compilation_per_shape(impl: str, dtype: torch.dtype) -> None:
    """20 steps of each size; what the control block says is no reason to compile."""
    torch._dynamo.reset()
    similarity = random_similarity(EXPERTS, torch.Generator().manual_seed(0))
    control = ControlBlock(torch.device("cpu"), [0], 64)
    eager, traced = (
        RerouteStage(
            0,
            TOP_K,
            LayerTable.build(similarity),
            control.words[0],
            control.row_class,
            torch.zeros(len(COUNTER_FIELDS), dtype=torch.int64),
            Switch(),
            impl,
        )
        for _ in range(2)
    )
    counter = CompileCounter()
    compiled = torch.compile(traced.run, backend=counter, dynamic=False)
    sizes = (8, 3)
    for rows in sizes:
        for step in range(CALLS):
            point = OperatingPoint(True, 1 + step % 3, 0.0) if step % 4 else OFF
            control.write(point, rows, b"", ())
            logits = torch.randn(rows, EXPERTS, generator=torch.Generator().manual_seed(step))
            weights, ids = logits.softmax(-1).topk(TOP_K)
            expected, expected_weights = ids.to(dtype, copy=True), weights.clone()
            eager.run(expected, expected_weights)
            found = ids.to(dtype, copy=True)
            compiled(found, weights)
            assert torch.equal(found, expected), step
            assert torch.equal(weights, expected_weights), step
    assert counter.frame_count == len(sizes)
    assert traced.ran and torch.equal(traced.counters, eager.counters)
    assert int(eager.counters.sum()) > 0, "something was re-routed"
