"""The CUDA kernels' own source against the oracle, in every form, without a GPU.

The emulator resumes threads in random order and reports barriers that not all of them reach.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from sere_sglang.ops import dispatch
from sere_sglang.ops.cuda.plan import (
    GRID_THREADS,
    HELD_SLOTS,
    MAX_THREADS,
    Form,
    Plan,
    Search,
    plan_fused,
    plan_reroute,
)
from sere_sglang.ops.fused import softmax_topk
from tests.ops import cases, emulated, fused_cases
from tests.ops.cases import Spec

CORNERS = [
    Spec(num_tokens=1),
    Spec(num_tokens=50, num_experts=40, top_k=6, classes=((1, 0.4),), holes=0.1),
    Spec(num_tokens=50, num_experts=40, top_k=5, num_valid=37, classes=((2, 0.0),), scale=True),
    Spec(num_tokens=33, num_valid=20, holes=0.6, classes=((1, 0.0), (3, 0.7)), row_classes=True),
    Spec(num_tokens=40, num_valid=11, holes=1.0),
    Spec(num_tokens=40, num_valid=17, holes=0.8, classes=((1, 0.5),)),
    Spec(num_tokens=40, num_valid=0),
    Spec(num_tokens=20, enabled=False, num_valid=3),
    Spec(num_tokens=20, classes=((0, 0.0),), num_valid=3),
    Spec(num_tokens=20, classes=((4, 0.0), (5, 0.0)), row_classes=True, num_valid=3),
    Spec(num_tokens=20, classes=((1, 0.0), (4, 0.0)), row_classes=True, num_valid=15),
    Spec(num_tokens=20, classes=((0, 0.0), (4, 0.0)), num_valid=15),
    Spec(num_tokens=20, num_experts=1, top_k=1),
    Spec(num_tokens=30, ranked=True, extra_columns=2, weight_levels=2),
    Spec(num_tokens=30, weight_levels=1, similarity_levels=1, extra_columns=1, scale=True),
    Spec(num_tokens=30, similarity_levels=4, classes=((1, 0.5),)),
    Spec(num_tokens=30, rho_of_matrix=True, classes=((1, 0.5),)),
    Spec(num_tokens=30, negative=True, classes=((1, 0.0),)),
    Spec(num_tokens=30, negative=True, classes=((1, 0.3),), num_valid=20),
    Spec(num_tokens=64, num_experts=130, top_k=8, classes=((1, 0.9),), num_valid=60, hot=0.5),
    Spec(num_tokens=48, num_experts=256, top_k=8, classes=((1, 0.97), (2, 0.0)), row_classes=True),
    Spec(num_tokens=30, foreign=0.2, holes=0.1, classes=((1, 0.5),)),
    Spec(num_tokens=30, num_experts=33, top_k=17, foreign=0.4, ranked=True, classes=((3, 0.0),)),
    # What frees a slot of row 0 names experts critical to the other class: in the grid, padding
    # rows must not take them from that row while it is being rewritten.
    Spec(
        num_tokens=40,
        num_experts=64,
        top_k=6,
        num_valid=6,
        classes=((1, 0.0), (1, 0.9)),
        row_classes=True,
    ),
    # As many slots as a row can have; experts that fill neither words nor loads of four.
    Spec(num_tokens=9, num_experts=32, top_k=32, classes=((1, 0.9),), num_valid=7),
    Spec(num_tokens=9, num_experts=127, top_k=31, classes=((30, 0.9), (1, 0.2)), row_classes=True),
    Spec(num_tokens=9, num_experts=129, top_k=17, classes=((1, 0.95),), num_valid=8, scale=True),
    Spec(num_tokens=9, num_experts=1023, top_k=5, classes=((1, 0.99),), similarity_levels=3),
]
LARGE = [
    Spec(num_tokens=20, num_experts=1024, top_k=32, classes=((2, 0.5),)),
    Spec(num_tokens=257, num_experts=128, top_k=8, classes=((1, 0.9),), num_valid=250),
    Spec(num_tokens=600, num_experts=64, top_k=6, classes=((2, 0.97),), num_valid=590, scale=True),
]


def plans(num_rows: int, lanes: int, most_threads: int = MAX_THREADS) -> list[Plan]:
    """Every form with few threads, so that small inputs take several passes and blocks."""
    found = []
    for form, blocks in ((Form.BLOCK, 1), (Form.CLUSTER, 3), (Form.CLUSTER, 8), (Form.GRID, 5)):
        threads = 32
        while -(-num_rows // blocks) > HELD_SLOTS * (threads // lanes):
            threads *= 2
        if threads <= min(most_threads, GRID_THREADS if form is Form.GRID else MAX_THREADS):
            found.append(Plan(form, blocks, threads))
    return found


def lanes_of(top_k: int) -> int:
    return 1 << (top_k - 1).bit_length()


def check(
    spec: Spec, plan: Plan, monkeypatch: pytest.MonkeyPatch, distinct: bool | None = None
) -> None:
    monkeypatch.setitem(dispatch._ready, ("emulated", "cpu"), emulated.Emulated(plan))
    try:
        cases.check(cases.make_case(spec), "emulated", distinct=distinct)
    except AssertionError as error:
        raise AssertionError(f"{plan} on {spec}: {error}") from None


@pytest.mark.parametrize("search", list(Search))
def test_corner_cases_in_every_form(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in CORNERS:
        for plan in plans(spec.num_tokens, lanes_of(spec.top_k)):
            check(spec, replace(plan, search=search), monkeypatch)


@pytest.mark.parametrize("search", [Search.ROWS, Search.NEIGHBORS])
def test_nan_gives_no_id_that_is_not_there(search: Search) -> None:
    """A profile with NaN is refused; if one came through, the layer would still be safe."""
    case = cases.make_case(Spec(num_tokens=30, num_experts=20, classes=((1, 0.5),)))
    for value in (float("nan"), -float("nan")):
        similarity = case.similarity.masked_fill(case.similarity > 0.3, value)
        neighbors = similarity.argsort(dim=1, descending=True).to(torch.int16)
        table = cases.LayerTable(similarity, neighbors)
        control = cases.encode_control(enabled=True, num_valid=25, classes=case.classes)
        assert case.weights is not None
        for plan in plans(30, 4):
            ids = case.ids.clone()
            emulated.Emulated(replace(plan, search=search)).reroute_(
                ids, case.weights.clone(), table, control, None, None, True
            )
            assert set(ids.unique().tolist()) <= set(case.ids.unique().tolist())


def test_random_cases_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(7)
    for _ in range(300):
        spec = cases.random_spec(rng, 200, 160)
        for plan in plans(spec.num_tokens, lanes_of(spec.top_k)):
            search = rng.choice(list(Search))
            check(spec, replace(plan, search=search), monkeypatch, distinct=rng.random() < 0.7)


@pytest.mark.parametrize("clusters", [True, False])
def test_the_chosen_launch_equals_the_oracle(
    clusters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = set()
    for spec in [*CORNERS[:3], *LARGE]:
        plan = plan_reroute(spec.num_tokens, spec.top_k, clusters)
        forms.add(plan.form)
        check(spec, plan, monkeypatch)
    assert forms == {Form.BLOCK, Form.CLUSTER if clusters else Form.GRID}


def test_every_size_has_a_launch_that_fits() -> None:
    for clusters in (True, False):
        for rows in [*range(1, 700), 1000, 1023, 1025, 4095, 4097, 8192, 32768, 100_000]:
            for top_k in (1, 2, 3, 4, 6, 8, 10, 17, 32):
                assert_fits(plan_reroute(rows, top_k, clusters), rows, lanes_of(top_k), clusters)
            for experts in (8, 256, 257, 1024):
                plan = plan_fused(rows, experts, clusters)
                assert_fits(plan, rows, 32, clusters)
                assert plan.threads <= (MAX_THREADS if experts <= 256 else MAX_THREADS // 2)


def assert_fits(plan: Plan, rows: int, lanes: int, clusters: bool) -> None:
    assert -(-rows // plan.blocks) <= HELD_SLOTS * (plan.threads // lanes), (plan, rows, lanes)
    assert plan.threads <= (GRID_THREADS if plan.form is Form.GRID else MAX_THREADS)
    assert clusters or plan.form is not Form.CLUSTER


def test_a_launch_that_does_not_fit_is_refused() -> None:
    ids = torch.zeros(600, 8, dtype=torch.int32)
    case = cases.make_case(Spec(num_tokens=600, top_k=8))
    table = cases.LayerTable.build(case.similarity)
    control = cases.encode_control(enabled=True, num_valid=-1, classes=[(1, 0.0)])
    with pytest.raises(ValueError, match="do not fit"):
        emulated.Emulated(Plan(Form.BLOCK, 1, 1024)).reroute_(
            ids, None, table, control, None, None, False
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_corner_cases_in_every_form(dtype: torch.dtype) -> None:
    for spec in CORNERS:
        for plan in plans(spec.num_tokens, 32):
            fused_cases.check(spec, dtype, fused_cases.emulated_at(plan))


def test_fused_random_cases_in_every_form() -> None:
    rng = random.Random(11)
    for _ in range(120):
        spec = cases.random_spec(rng, 100, 300)
        dtype = rng.choice([torch.float32, torch.bfloat16])
        for plan in plans(spec.num_tokens, 32, most_threads=MAX_THREADS // 2):
            fused_cases.check(spec, dtype, fused_cases.emulated_at(plan))


def test_fused_rows_as_they_come() -> None:
    """Without distinct rows: rules 1 to 7 on what top-k gives."""
    case = cases.make_case(Spec(num_tokens=40, num_experts=24, top_k=6))
    table = cases.LayerTable.build(case.similarity)
    control = cases.encode_control(enabled=True, num_valid=33, classes=[(1, 0.4)])
    logits = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    for plan in plans(40, 32):
        weights, ids = emulated.fused(plan, logits, 6, True, table, control, distinct=False)
        plain, chosen = softmax_topk(logits, 6, renormalize=True)
        cases.reroute_(chosen, plain, table, control, distinct=False, impl="torch")
        assert torch.equal(ids, chosen)
        torch.testing.assert_close(weights, plain, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("clusters", [True, False])
def test_fused_chosen_launch(clusters: bool) -> None:
    for spec in [
        *LARGE,
        Spec(num_tokens=70, num_experts=512, top_k=10, classes=((1, 0.9),), num_valid=69),
        Spec(num_tokens=9, num_experts=257, top_k=10, classes=((1, 0.0),)),
    ]:
        plan = plan_fused(spec.num_tokens, spec.num_experts, clusters)
        fused_cases.check(spec, torch.bfloat16, fused_cases.emulated_at(plan))
