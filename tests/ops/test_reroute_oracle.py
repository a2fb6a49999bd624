"""Every implementation against the brute-force oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sere_sglang.ops import reroute
from tests.ops import cases, oracle
from tests.ops.cases import Spec

# Triton's interpreter takes seconds for what the others do in milliseconds.
SLOW = {"triton"}
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def specs(draw: st.DrawFn, max_tokens: int = 512, max_experts: int = 512) -> Spec:
    top_k = draw(st.integers(1, 16))
    num_experts = draw(st.integers(top_k, max_experts))
    num_tokens = draw(st.integers(0, 12) | st.integers(0, max_tokens))
    size = st.integers(1, top_k + 1) | st.integers(-1, top_k + 1)
    rho = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1, width=32)
    return Spec(
        seed=draw(st.integers(0, 2**32 - 1)),
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=top_k,
        num_valid=draw(st.just(-1) | st.integers(-2, num_tokens + 2)),
        classes=tuple(draw(st.lists(st.tuples(size, rho), min_size=1, max_size=4))),
        enabled=draw(st.integers(0, 9)) > 0,
        row_classes=draw(st.booleans()),
        ranked=draw(st.booleans()),
        weight_levels=draw(st.sampled_from([0, 1, 2, 5])),
        similarity_levels=draw(st.sampled_from([0, 1, 2, 8])),
        symmetric=draw(st.booleans()),
        negative=draw(st.booleans()),
        holes=draw(st.sampled_from([0.0, 0.1, 0.7, 1.0])),
        hot=draw(st.sampled_from([1.0, 0.5, 0.1])),
        scale=draw(st.booleans()),
        neighbors=draw(st.booleans()),
        extra_columns=draw(st.integers(0, 2)),
        rho_of_matrix=draw(st.booleans()),
    )


def test_reroute_in_place_equals_the_oracle(impl: str) -> None:
    limits = (24, 64) if impl in SLOW else (512, 512)

    @settings(FEW, max_examples=25 if impl in SLOW else 150)
    @given(specs(*limits))
    def run(spec: Spec) -> None:
        cases.check(cases.make_case(spec), impl)

    run()


DECODE = Spec(num_tokens=12, num_experts=32, top_k=4, classes=((2, 0.6),), holes=0.1)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(Spec(num_tokens=0), id="no tokens"),
        pytest.param(Spec(holes=1.0), id="P empty"),
        pytest.param(Spec(num_tokens=30, foreign=0.3, holes=0.1), id="ids that are no experts"),
        pytest.param(Spec(foreign=1.0, scale=True), id="no experts at all"),
        pytest.param(Spec(holes=1.0, num_valid=3), id="P empty, padding"),
        pytest.param(Spec(num_valid=0), id="only padding"),
        pytest.param(Spec(num_valid=3), id="padding copies a whole row"),
        pytest.param(Spec(num_valid=5, holes=0.8), id="padding when no row is whole"),
        pytest.param(Spec(classes=((0, 0.0),)), id="S = 0"),
        pytest.param(Spec(classes=((-1, 0.5),), num_valid=2), id="S < 0"),
        pytest.param(Spec(classes=((4, 0.0),), num_valid=2), id="S = K"),
        pytest.param(Spec(classes=((9, 0.0),)), id="S > K"),
        pytest.param(Spec(enabled=False, num_valid=2), id="disabled"),
        pytest.param(Spec(classes=((4, 0.0), (5, 0.0)), row_classes=True), id="all protected"),
        pytest.param(Spec(classes=((1, 0.0), (4, 0.0)), row_classes=True), id="some protected"),
        pytest.param(Spec(classes=((0, 0.0), (4, 0.0))), id="S = 0 of several classes is 1"),
        pytest.param(
            Spec(num_tokens=40, classes=((1, 0.9), (2, 0.0), (3, 1.0), (4, 0.5)), row_classes=True),
            id="four classes",
        ),
        pytest.param(Spec(weight_levels=1), id="all weights equal"),
        pytest.param(Spec(similarity_levels=1), id="all similarities equal"),
        pytest.param(Spec(similarity_levels=4, classes=((1, 0.5),)), id="rho equals entries"),
        pytest.param(Spec(classes=((1, 1.0),)), id="rho = 1"),
        pytest.param(Spec(negative=True, classes=((1, 0.0),)), id="rho = 0, negative entries"),
        pytest.param(Spec(scale=True, classes=((1, 0.0),), extra_columns=1), id="scale"),
        pytest.param(Spec(num_experts=1, top_k=1, classes=((1, 0.0),)), id="one expert"),
        pytest.param(
            Spec(num_tokens=70, num_experts=1024, top_k=32, classes=((2, 0.5),)), id="largest E, K"
        ),
        pytest.param(DECODE, id="decode"),
    ],
)
def test_corner_cases(spec: Spec, impl: str) -> None:
    if impl in SLOW and spec.num_experts > 128:
        pytest.skip("too large for Triton's interpreter")
    for seed in range(3):
        cases.check(cases.make_case(Spec(**{**spec.__dict__, "seed": seed})), impl)


def test_threshold_reached_exactly_moves_and_the_next_float_stays(impl: str) -> None:
    entry = torch.tensor(0.7)
    above = float(torch.nextafter(entry, torch.tensor(1.0)))
    similarity = torch.eye(3)
    similarity[1, 0] = similarity[0, 1] = entry
    ids = torch.tensor([[0, 1]], dtype=torch.int32)
    at = reroute(ids, similarity, primary_k=1, threshold=float(entry), impl=impl)
    beyond = reroute(ids, similarity, primary_k=1, threshold=above, impl=impl)
    assert at.tolist() == [[0, 0]]
    assert beyond.tolist() == [[0, 1]]


def test_functional_form_equals_the_oracle(impl: str) -> None:
    limits = (24, 64) if impl in SLOW else (256, 256)

    @settings(FEW, max_examples=15 if impl in SLOW else 60)
    @given(specs(*limits), st.integers(-1, 17), st.booleans())
    def run(spec: Spec, primary_k: int, with_protected: bool) -> None:
        case = cases.make_case(spec)
        rows, top_k = spec.num_tokens, spec.top_k
        num_valid = None if spec.num_valid < 0 else min(spec.num_valid, rows)
        threshold = case.classes[0][1]
        protected = None
        if with_protected:
            generator = torch.Generator().manual_seed(spec.seed)
            protected = torch.rand(rows, generator=generator) < 0.3
        moves = 0 < primary_k < top_k
        want = oracle.reroute(
            case.ids.tolist(),
            None if case.weights is None else case.weights.tolist(),
            case.similarity.tolist(),
            enabled=moves,
            num_valid=-1 if num_valid is None else num_valid,
            classes=[(primary_k, threshold), (top_k, 0.0)],
            row_class=None if protected is None else protected.to(torch.uint8).tolist(),
        )
        before = case.ids.clone()
        got = reroute(
            case.ids.long() if spec.seed % 2 else case.ids,
            case.similarity,
            primary_k=primary_k,
            threshold=threshold,
            topk_weights=case.weights,
            num_valid=num_valid,
            protected=protected,
            impl=impl,
        )
        assert got.dtype == torch.int32
        assert got.tolist() == want.ids
        assert torch.equal(case.ids, before)

    run()


def test_equals_the_published_kernel_on_its_inputs(impl: str) -> None:
    @settings(FEW, max_examples=10 if impl in SLOW else 60)
    @given(
        seed=st.integers(0, 2**32 - 1),
        num_tokens=st.integers(1, 16 if impl in SLOW else 128),
        num_experts=st.integers(8, 64),
        top_k=st.integers(1, 8),
        select_top_k=st.integers(0, 9),
        threshold=st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.875, 1.0]),
        levels=st.sampled_from([0, 8]),
    )
    def run(
        seed: int,
        num_tokens: int,
        num_experts: int,
        top_k: int,
        select_top_k: int,
        threshold: float,
        levels: int,
    ) -> None:
        case = cases.make_case(
            Spec(
                seed=seed,
                num_tokens=num_tokens,
                num_experts=num_experts,
                top_k=top_k,
                similarity_levels=levels,
            )
        )
        got = reroute(
            case.ids, case.similarity, primary_k=select_top_k, threshold=threshold, impl=impl
        )
        similarity = case.similarity.tolist()
        assert got.tolist() == oracle.published(
            case.ids.tolist(), similarity, select_top_k, threshold
        )

    run()


def test_active_experts_never_grow(impl: str) -> None:
    for seed in range(20):
        case = cases.make_case(Spec(**{**DECODE.__dict__, "seed": seed, "num_valid": 9}))
        out = reroute(
            case.ids,
            case.similarity,
            primary_k=1,
            topk_weights=case.weights,
            num_valid=9,
            impl=impl,
        )
        chosen = set(case.ids[:9].flatten().tolist())
        assert set(out[:9].flatten().tolist()) <= chosen
        assert set(out[9:].flatten().tolist()) <= set(out[:9].flatten().tolist()) - {-1}
