"""The GPU implementations against the oracle, in graphs and on streams."""

from __future__ import annotations

import random

import pytest
import torch

from sere_sglang.ops import (
    COUNTER_FIELDS,
    LayerTable,
    encode_control,
    new_counters,
    reroute_,
    select_impl,
)
from tests.gpu.shared import SIZES, capture
from tests.ops import cases, oracle
from tests.ops.cases import Spec

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_tokens", [1, 7, 32, 64, 129, 256, 600])
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_decode_sizes(num_tokens: int, num_experts: int, top_k: int, impl: str) -> None:
    for seed, classes in enumerate([((1, 0.0),), ((2, 0.99),), ((1, 0.97), (top_k, 0.0))]):
        spec = Spec(
            seed=seed,
            num_tokens=num_tokens,
            num_experts=num_experts,
            top_k=top_k,
            classes=classes,
            row_classes=len(classes) > 1,
            num_valid=-1 if seed == 0 else num_tokens - num_tokens // 4,
            holes=0.05 * seed,
            scale=seed == 1,
            extra_columns=seed,
        )
        cases.check(cases.make_case(spec), impl, "cuda")


def test_random_cases(impl: str) -> None:
    rng = random.Random(3)
    for _ in range(150 if impl == "cuda" else 40):  # Triton compiles anew for each
        cases.check(cases.make_case(cases.random_spec(rng, 600, 300)), impl, "cuda")


@pytest.mark.parametrize("num_tokens", [1000, 4096, 8192])
def test_prefill_sizes(num_tokens: int, impl: str) -> None:
    spec = Spec(
        num_tokens=num_tokens,
        num_experts=128,
        top_k=8,
        classes=((1, 0.97),),
        num_valid=num_tokens - 100,
        hot=0.3,
        scale=True,
    )
    cases.check(cases.make_case(spec), impl, "cuda")


@pytest.mark.parametrize("num_tokens", [24, 1500, 6000])
def test_one_graph_serves_every_operating_point(num_tokens: int, impl: str) -> None:
    """Enabled, S, rho, padding and row classes change between replays, on the device alone."""
    case = cases.make_case(Spec(num_tokens=num_tokens, num_experts=64, top_k=6))
    assert case.weights is not None
    table = LayerTable.build(case.similarity, device="cuda")
    source, source_weights = case.ids.cuda(), case.weights.cuda()
    ids, weights = source.clone(), source_weights.clone()
    control = encode_control(enabled=False, num_valid=-1, classes=[(1, 0.0)]).cuda()
    row_class = torch.zeros(num_tokens, dtype=torch.uint8, device="cuda")
    counters = new_counters(1, "cuda")[0]

    def step() -> None:
        ids.copy_(source)
        weights.copy_(source_weights)
        reroute_(ids, weights, table, control, row_class=row_class, counters=counters, impl=impl)

    graph = capture(step)
    rng = random.Random(5)
    for _ in range(8):
        classes = [
            (rng.choice([0, 1, 2, 6]), rng.choice([0.0, 0.9, 0.99]))
            for _ in range(rng.choice([1, 2, 4]))
        ]
        num_valid = rng.choice([-1, 0, 1, num_tokens // 2])
        enabled = rng.random() < 0.8
        of_row = torch.randint(0, len(classes), (num_tokens,), dtype=torch.uint8)
        control.copy_(encode_control(enabled=enabled, num_valid=num_valid, classes=classes))
        row_class.copy_(of_row)
        counters.zero_()
        graph.replay()
        want = oracle.reroute(
            case.ids.tolist(),
            case.weights.tolist(),
            case.similarity.tolist(),
            enabled=enabled,
            num_valid=num_valid,
            classes=classes,
            row_class=of_row.tolist(),
            distinct=True,
        )
        assert ids.tolist() == want.ids
        assert weights.tolist() == want.weights
        assert dict(zip(COUNTER_FIELDS, counters.tolist(), strict=True)) == want.counters


def test_what_comes_before_on_the_stream_is_seen(impl: str) -> None:
    """A chain of kernels without a host in between: early starts must not read stale ids."""
    case = cases.make_case(Spec(num_tokens=48, num_experts=128, top_k=8, classes=((1, 0.9),)))
    want = cases.expected(case)
    table = LayerTable.build(case.similarity, device="cuda")
    assert case.weights is not None
    source, weights = case.ids.cuda(), case.weights.cuda()
    control = encode_control(enabled=True, num_valid=-1, classes=case.classes).cuda()
    results = []
    for _ in range(200):
        ids = torch.full_like(source, -1)
        ids.copy_(source)
        own = weights.clone()
        reroute_(ids, own, table, control, impl=impl)
        results.append((ids + 0, own + 0))
    for ids, own in results:
        assert ids.tolist() == want.ids and own.tolist() == want.weights


@pytest.mark.parametrize("num_tokens", [40, 3000, 6000])
def test_a_control_block_copied_right_before_is_seen(num_tokens: int, impl: str) -> None:
    """As the scheduler writes it: from pinned memory, not waiting for the copy."""
    case = cases.make_case(Spec(num_tokens=num_tokens, num_experts=64, top_k=6))
    table = LayerTable.build(case.similarity, device="cuda")
    source, control = case.ids.cuda(), torch.zeros(16, dtype=torch.int32, device="cuda")
    points = [(True, 1, -1), (False, 1, -1), (True, 2, num_tokens // 2), (True, 5, 3)]
    blocks = [
        encode_control(enabled=enabled, num_valid=num_valid, classes=[(primary_k, 0.0)])
        for enabled, primary_k, num_valid in points
    ]
    pinned = [block.pin_memory() for block in blocks]
    results = []
    for turn in range(80):
        ids = source.clone()
        control.copy_(pinned[turn % len(points)], non_blocking=True)
        reroute_(ids, None, table, control, distinct=False, impl=impl)
        results.append(ids)
    wanted = [
        oracle.reroute(
            case.ids.tolist(),
            None,
            case.similarity.tolist(),
            enabled=enabled,
            num_valid=num_valid,
            classes=[(primary_k, 0.0)],
        ).ids
        for enabled, primary_k, num_valid in points
    ]
    for turn, ids in enumerate(results):
        assert ids.tolist() == wanted[turn % len(points)]


@pytest.mark.parametrize("spec", [Spec(num_tokens=0), Spec(num_tokens=300, foreign=0.3, holes=0.1)])
def test_nothing_to_do_and_ids_that_are_no_experts(spec: Spec, impl: str) -> None:
    cases.check(cases.make_case(spec), impl, "cuda")


@pytest.mark.parametrize("num_tokens", [32, 6000])
def test_streams_do_not_meet(num_tokens: int, impl: str) -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    runs = []
    for seed, stream in enumerate(streams * 4):
        case = cases.make_case(
            Spec(seed=seed, num_tokens=num_tokens, num_experts=64, top_k=6, classes=((1, 0.9),))
        )
        table = LayerTable.build(case.similarity, device="cuda")
        assert case.weights is not None
        ids, weights = case.ids.cuda(), case.weights.cuda()
        control = encode_control(enabled=True, num_valid=-1, classes=case.classes).cuda()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            reroute_(ids, weights, table, control, impl=impl)
        runs.append((case, ids, weights, (table, control)))
    torch.cuda.synchronize()
    for case, ids, weights, _ in runs:
        want = cases.expected(case)
        assert ids.tolist() == want.ids and weights.tolist() == want.weights


def test_auto_chooses_cuda() -> None:
    assert select_impl("cuda", strict=True) == "cuda"
