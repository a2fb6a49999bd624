"""Rows stay distinct (docs/semantics.md, rule 8), in every implementation of `reroute_`."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from sere_sglang import apply_rule
from sere_sglang.cpu.moe import fused_moe
from sere_sglang.ops import LayerTable, encode_control, new_counters, reroute_
from tests.ops import cases, oracle
from tests.ops.cases import Case, Spec

SLOW = {"triton"}  # its interpreter takes seconds for what the others do in milliseconds


def specs(impl: str, seed: int) -> list[Spec]:
    rng = random.Random(seed)
    limits = (20, 40) if impl in SLOW else (120, 120)
    found = [cases.random_spec(rng, *limits) for _ in range(20 if impl in SLOW else 200)]
    sure = Spec(num_tokens=12, num_experts=24, top_k=5, classes=((1, 0.3),), num_valid=10)
    return [sure, *(replace(spec, ranked=False) for spec in found)]


def run(case: Case, impl: str, distinct: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, weights, counters."""
    assert case.weights is not None
    ids, weights, counters = case.ids.clone(), case.weights.clone(), new_counters(1)[0]
    spec = case.spec
    reroute_(
        ids,
        weights,
        LayerTable.build(case.similarity, case.scale),
        encode_control(enabled=spec.enabled, num_valid=spec.num_valid, classes=case.classes),
        row_class=case.row_class,
        counters=counters,
        distinct=distinct,
        impl=impl,
    )
    return ids, weights, counters


def test_no_row_holds_an_expert_twice_and_every_row_sums_the_same(impl: str) -> None:
    met = 0
    for spec in specs(impl, 1):
        case = cases.make_case(spec)
        plain_ids, plain_weights, plain_counters = run(case, impl, distinct=False)
        ids, weights, counters = run(case, impl, distinct=True)
        assert torch.equal(counters, plain_counters), "no other expert is loaded"
        valid = spec.num_tokens if spec.num_valid < 0 else min(spec.num_valid, spec.num_tokens)
        active = set(plain_ids[:valid].flatten().tolist())
        whole = False
        for t, (before, plain, row) in enumerate(
            zip(case.ids.tolist(), plain_ids.tolist(), ids.tolist(), strict=True)
        ):
            if t >= valid and not whole:
                break  # nothing to copy: the lowest of A, which may be fewer than K
            whole |= min(row) >= 0
            assert len(set(row) - {-1}) == len([e for e in row if e != -1])
            if t >= valid:
                continue
            assert [e < 0 for e in row] == [e < 0 for e in before]
            assert set(row) <= active | set(before)
            if len(active - {-1}) >= spec.top_k:
                assert set(row) <= active
            if plain == row:
                assert torch.equal(weights[t], plain_weights[t])
            else:
                met += 1
            wanted = oracle.by_expert(plain, plain_weights[t].tolist())
            got = oracle.by_expert(row, weights[t].tolist())
            assert got == pytest.approx(wanted, rel=1e-5)
    assert met > 0


def test_equals_apply_rule_similarity_bit_for_bit(impl: str) -> None:
    compared = 0
    for spec in specs(impl, 2):
        spec = replace(spec, row_classes=False, scale=False, classes=spec.classes[:1], enabled=True)
        case = cases.make_case(spec)
        (primary_k, threshold), *_ = case.classes
        if not 0 < primary_k < spec.top_k or spec.num_tokens == 0:
            continue
        num_valid = None if spec.num_valid < 0 else min(spec.num_valid, spec.num_tokens)
        # The rule leaves protected rows alone: here they are those of a second class.
        generator = torch.Generator().manual_seed(spec.seed)
        protected = torch.rand(spec.num_tokens, generator=generator) < 0.2
        case.classes = ((primary_k, threshold), (spec.top_k, 0.0))
        case.row_class = protected.to(torch.uint8)
        assert case.weights is not None
        ids, weights, counters = run(case, impl, distinct=True)
        for rule_impl in ("torch", "cpu"):
            want = apply_rule(
                "similarity",
                case.ids,
                case.weights,
                similarity=case.similarity,
                primary_k=primary_k,
                threshold=threshold,
                num_valid=num_valid,
                protected=protected,
                impl=rule_impl,
            )
            assert torch.equal(ids, want.ids)
            # A padding row keeps its own weights here.
            assert torch.equal(weights[:num_valid], want.weights[:num_valid])
            assert int(counters[3]) <= int(want.active.sum())
        compared += 1
    assert compared > 5


def test_weights_that_meet_are_scaled_first_and_added_in_slot_order(impl: str) -> None:
    similarity = torch.eye(6)
    similarity[2:, 0] = 0.5
    scale = torch.ones(6, 6)
    scale[2, 0], scale[3, 0] = 0.3, 1.7
    ids = torch.tensor([[0, 2, 3, 4], [1, 5, -1, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.9, 0.05, 0.03, 0.02]])
    control = encode_control(enabled=True, num_valid=-1, classes=[(1, 0.0)])
    got, own = ids.clone(), weights.clone()
    reroute_(got, own, LayerTable.build(similarity, scale), control, impl=impl)
    # P = {0, 1}: of three freed slots one gets 1; 3 and 4 stay where they were, at weight 0.
    assert got.tolist() == [[0, 1, 3, 4], [1, 0, -1, 5]]
    a, b, c, d = weights[0]
    total = (a + b * scale[2, 0]) + c * scale[3, 0] + d
    assert torch.equal(own[0], torch.stack([total, *torch.zeros(3)]))
    a, b, empty, c = weights[1]
    assert torch.equal(own[1], torch.stack([a, b + c, empty, torch.tensor(0.0)]))


@pytest.mark.parametrize("rows", [1, 3, 24])
def test_the_layer_computes_the_same(impl: str, rows: int) -> None:
    """Through the real CPU runner, with a table that scales what moves."""
    generator = torch.Generator().manual_seed(rows)
    experts, hidden, inter = 12, 64, 48
    case = cases.make_case(
        Spec(num_tokens=rows, num_experts=experts, classes=((1, 0.3),), scale=True, seed=rows)
    )
    x = torch.randn(rows, hidden, generator=generator)
    w13 = torch.randn(experts, 2 * inter, hidden, generator=generator) / hidden**0.5
    w2 = torch.randn(experts, hidden, inter, generator=generator) / inter**0.5
    plain_ids, plain_weights, _ = run(case, impl, distinct=False)
    assert any(len(set(row)) < case.spec.top_k for row in plain_ids.tolist())
    ids, weights, _ = run(case, impl, distinct=True)
    assert all(len(set(row)) == case.spec.top_k for row in ids.tolist())
    before = fused_moe(x, w13, w2, plain_ids, plain_weights)
    after = fused_moe(x, w13, w2, ids, weights)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    # An expert that only freed slots hold is not read.
    idle = sorted(set(range(experts)) - set(ids[weights != 0].tolist()))
    w13[idle], w2[idle] = float("nan"), float("nan")
    assert torch.equal(fused_moe(x, w13, w2, ids, weights), after)


def test_an_expert_given_twice_ends_nowhere_strange(impl: str) -> None:
    """No router of SGLang's does it; ids stay in range, and a row's sum stays what it was."""
    generator = torch.Generator().manual_seed(3)
    for seed in range(5 if impl in SLOW else 50):
        case = cases.make_case(Spec(num_tokens=9, num_experts=7, top_k=5, classes=((1, 0.4),)))
        case.ids = torch.randint(0, 7, (9, 5), generator=generator, dtype=torch.int32)
        case.spec = replace(case.spec, seed=seed)
        plain_ids, plain_weights, _ = run(case, impl, distinct=False)
        ids, weights, _ = run(case, impl, distinct=True)
        assert int(ids.min()) >= 0 and int(ids.max()) < 7
        for t in range(9):
            wanted = oracle.by_expert(plain_ids[t].tolist(), plain_weights[t].tolist())
            got = oracle.by_expert(ids[t].tolist(), weights[t].tolist())
            assert got == pytest.approx(wanted, rel=1e-5)


def test_ids_alone_cannot_become_distinct() -> None:
    ids = torch.tensor([[0, 1]], dtype=torch.int32)
    control = encode_control(enabled=True, num_valid=-1, classes=[(1, 0.0)])
    with pytest.raises(ValueError, match="topk_weights is missing"):
        reroute_(ids, None, LayerTable.build(torch.eye(2)), control)
