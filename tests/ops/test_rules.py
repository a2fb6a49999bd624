"""`apply_rule`: every rule and implementation against the oracle, and what all rules promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sere_sglang import apply_rule
from sere_sglang.cpu.moe import fused_moe
from sere_sglang.ops import available_impls, reroute, rules
from sere_sglang.ops.jit import BuildError
from sere_sglang.ops.rules import IMPLEMENTATIONS, load_rules
from sere_sglang.ops.rules_call import LARGEST_TERM, MAX_ROWS
from sere_sglang.ops.rules_check import checked
from tests.ops.rules_cases import Batch
from tests.ops.rules_oracle import lost_energy
from tests.ops.rules_strategies import batches

# torch and cpu; those of a GPU have tests of their own: tests/gpu/test_gpu_rules.py, Triton's
# interpreter included, and test_rules_emulation.py.
IMPLS = [name for name in available_impls("cpu") if name in IMPLEMENTATIONS and name != "triton"]
MANY = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("impl_name", IMPLS)
def test_equals_the_oracle(impl_name: str) -> None:
    @settings(MANY, max_examples=500)
    @given(batches())
    def run(batch: Batch) -> None:
        before = batch.ids.clone(), batch.weights.clone()
        got, want = batch.run(impl_name), batch.expected()
        assert got.ids.dtype == torch.int32 and got.weights.dtype == torch.float32
        assert got.ids.tolist() == want.ids
        if want.ids:
            wanted = torch.tensor(want.weights)
            torch.testing.assert_close(got.weights, wanted, rtol=3e-6, atol=1e-7)
        assert set(got.active.nonzero().flatten().tolist()) == want.active
        if batch.ids.shape[0]:
            assert got.lost is not None
            lost = torch.zeros_like(got.lost)
            for t, row in enumerate(want.lost):
                for e, weight in row.items():
                    lost[t, e] = weight
            assert torch.equal(got.lost, lost)
        assert torch.equal(batch.ids, before[0]) and torch.equal(batch.weights, before[1])

    run()


@pytest.mark.parametrize("impl_name", IMPLS)
def test_a_square_beyond_float32_costs_the_most_there_is(impl_name: str) -> None:
    """Also times a loss of 0, which float32 makes NaN of."""
    call = checked(
        "energy",
        torch.tensor([[3, 1, 0, 2]]),
        torch.tensor([[3e38, -1e20, 1e30, -1e20]]),
        scores=torch.ones(1, 4),
        loss=0.0,
        expert_loss=torch.tensor([1.0, 1.0, 0.0, 0.0]),
    )
    assert load_rules(impl_name, "cpu").apply(call).active.all()


@pytest.mark.parametrize("impl_name", [name for name in IMPLS if name != "torch"])
def test_equals_the_reference_bit_for_bit(impl_name: str) -> None:
    """At sizes too large for the oracle; a power of the mass alone may round differently."""

    @settings(MANY, max_examples=60)
    @given(batches(max_rows=128, max_experts=256, max_k=32))
    def run(batch: Batch) -> None:
        got, want = batch.run(impl_name), batch.run("torch")
        assert torch.equal(got.ids, want.ids) and torch.equal(got.active, want.active)
        if batch.options["renormalize"] in (0.0, 1.0) or batch.rule != "energy":
            assert torch.equal(got.weights, want.weights)
        else:
            torch.testing.assert_close(got.weights, want.weights, rtol=1e-6, atol=0)
        assert (got.lost is None) == (want.lost is None)
        assert got.lost is None or want.lost is None or torch.equal(got.lost, want.lost)

    run()


@pytest.mark.parametrize("impl_name", IMPLS)
def test_rows_are_distinct_and_hold_no_hole_that_they_did_not_have(impl_name: str) -> None:
    @settings(MANY)
    @given(batches())
    def run(batch: Batch) -> None:
        got = batch.run(impl_name)
        rows = len(batch.ids) if batch.options["num_valid"] is None else batch.options["num_valid"]
        for before, after in zip(batch.ids.tolist()[:rows], got.ids.tolist()[:rows], strict=True):
            assert [e < 0 for e in before] == [e < 0 for e in after]
            held = [e for e in after if e >= 0]
            assert len(set(held)) == len(held)

    run()


@pytest.mark.parametrize("impl_name", IMPLS)
def test_the_order_of_the_rows_does_not_matter(impl_name: str) -> None:
    @settings(MANY)
    @given(batches(), st.randoms(use_true_random=False))
    def run(batch: Batch, rng: Any) -> None:
        rows = len(batch.ids)
        options = batch.options | {"num_valid": None}
        order = torch.tensor(rng.sample(range(rows), rows), dtype=torch.int64)
        shuffled = dict(options, scores=options["scores"][order])
        for name in ("protected", "fast"):
            if options[name] is not None:
                shuffled[name] = options[name][order]
        got = Batch(batch.rule, batch.ids, batch.weights, options).run(impl_name)
        again = Batch(batch.rule, batch.ids[order], batch.weights[order], shuffled).run(impl_name)
        assert torch.equal(again.ids, got.ids[order])
        assert torch.equal(again.weights, got.weights[order])
        assert torch.equal(again.active, got.active)

    run()


@pytest.mark.parametrize("impl_name", IMPLS)
def test_largest_sums_do_not_overflow(impl_name: str) -> None:
    """8192 rows of the largest term: the sum is 2^62, and saturates rather than wraps."""
    ids = torch.tensor([[0, 1, 2]]).repeat(MAX_ROWS, 1)
    huge = float(LARGEST_TERM)  # far above what a term may be
    weights = torch.tensor([[2 * huge, huge, 1e-3]]).repeat(MAX_ROWS, 1)
    scores = torch.tensor([[huge, huge, 0.5, 0.25]]).repeat(MAX_ROWS, 1)
    got = apply_rule("energy", ids, weights, scores=scores, loss=1.0, impl=impl_name)
    assert got.active.tolist() == [True, True, True, False]  # the surplus slot keeps its expert
    assert got.weights[0].tolist() == [2 * huge, huge, 0.0]
    budget = apply_rule(
        "budget",
        ids,
        weights,
        scores=scores,
        budget=3,
        warmup=False,
        fill="truncate",
        impl=impl_name,
    )
    assert budget.active.tolist() == [True, True, True, False]


@pytest.mark.parametrize("impl_name", IMPLS)
def test_the_running_sum_over_experts_does_not_overflow(impl_name: str) -> None:
    """Expert 0 is everybody's first; the others' energies are far above the budget together."""
    experts, top_k = 64, 32
    ids = torch.zeros(MAX_ROWS, top_k, dtype=torch.int32)
    for row in (0, 1):
        ids[row::2, 1:] = torch.arange(1, top_k) + row * (top_k - 1)
    weights = torch.full(ids.shape, 256.0)
    weights[:, 0] = 257.0
    scores = torch.rand(MAX_ROWS, experts)
    got = apply_rule("energy", ids, weights, scores=scores, loss=1e-3, impl=impl_name)
    assert int(got.active.sum()) == 2 * top_k - 1


@pytest.mark.parametrize("impl_name", IMPLS)
def test_sums_are_rounded_to_the_nearest_and_ties_to_even(impl_name: str) -> None:
    unit = 2.0**-32
    ids, weights = torch.tensor([[0, 1]]), torch.tensor([[0.5, 1.25 * 2.0**-16]])  # 1.5625 units
    for limit, dropped in ((1, False), (2, True)):
        got = apply_rule(
            "energy", ids, weights, similarity=torch.eye(3), loss=limit * unit, impl=impl_name
        )
        assert bool(got.lost is not None and got.lost[0, 1] > 0) == dropped
    scores = torch.tensor([[2.0, 2.5, 3.5, 4.0]]) * unit  # 2, 2, 4, 4 units
    for budget, active in ((1, [2]), (2, [2, 3]), (3, [0, 2, 3])):
        got = apply_rule(
            "budget",
            torch.tensor([[0, 1, 2, 3]]),
            torch.ones(1, 4),
            scores=scores,
            budget=budget,
            warmup=False,
            impl=impl_name,
        )
        assert got.lost is not None and (got.lost[0] == 0).nonzero().flatten().tolist() == active


@pytest.mark.parametrize("impl_name", IMPLS)
def test_a_surplus_slot_takes_what_another_gave_up(impl_name: str) -> None:
    """A = {2, 3}. Slot 1 moves to 2 and is surplus, 8 moves to 3, so slot 3 finds 3 taken."""
    ids = torch.tensor([[2, 7, 8, 3], [3, 2, -1, -1]])
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.6, 0.4, 0.0, 0.0]])
    similarity = torch.eye(9)
    similarity[7, 2] = similarity[8, 3] = 0.5
    got = apply_rule("similarity", ids, weights, similarity=similarity, primary_k=1, impl=impl_name)
    assert got.ids.tolist() == [[2, 7, 3, 8], [3, 2, -1, -1]]
    torch.testing.assert_close(got.weights[0], torch.tensor([0.7, 0.0, 0.3, 0.0]))


@pytest.mark.parametrize("impl_name", IMPLS)
@pytest.mark.parametrize("rows", [1, 3, 24])
def test_distinct_rows_compute_what_equal_ids_did(impl_name: str, rows: int) -> None:
    """Through the real CPU runner: today's SERE, which may hold an expert twice in a row."""
    generator = torch.Generator().manual_seed(rows)
    experts, top_k, hidden, inter = 12, 4, 64, 48
    logits = torch.randn(rows, experts, generator=generator)
    weights, ids = logits.softmax(dim=1).topk(top_k, dim=1)
    similarity = torch.rand(experts, experts, generator=generator)
    x = torch.randn(rows, hidden, generator=generator)
    w13 = torch.randn(experts, 2 * inter, hidden, generator=generator) / hidden**0.5
    w2 = torch.randn(experts, hidden, inter, generator=generator) / inter**0.5
    equal_ids = reroute(ids, similarity, primary_k=1, topk_weights=weights)
    assert any(len(set(row)) < top_k for row in equal_ids.tolist())
    got = apply_rule("similarity", ids, weights, similarity=similarity, primary_k=1, impl=impl_name)
    assert all(len(set(row)) == top_k for row in got.ids.tolist())
    before = fused_moe(x, w13, w2, equal_ids, weights, activation="silu")
    after = fused_moe(x, w13, w2, got.ids, got.weights, activation="silu")
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl_name", IMPLS)
def test_similarity_that_is_off_changes_nothing(impl_name: str) -> None:
    ids, weights = torch.tensor([[3, 1], [0, 2], [2, 1]]), torch.rand(3, 2)
    for primary_k in (-1, 0, 2, 5):
        got = apply_rule(
            "similarity",
            ids,
            weights,
            similarity=torch.eye(5),
            primary_k=primary_k,
            num_valid=2,
            impl=impl_name,
        )
        assert got.ids.tolist() == ids.tolist() and torch.equal(got.weights, weights)
        assert got.active.tolist() == [True] * 4 + [False] and got.lost is None


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)], ids=str)
def test_what_has_no_slots_lost_nothing(shape: tuple[int, int]) -> None:
    ids, weights = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    got = apply_rule("energy", ids, weights, similarity=torch.eye(5), loss=0.1)
    assert got.ids.shape == got.weights.shape == shape and not got.active.any()
    assert got.lost is not None and torch.equal(got.lost, torch.zeros(shape[0], 5))


def test_a_gpus_kernel_says_what_it_serves() -> None:
    ids, weights = torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]])
    with pytest.raises(RuntimeError, match="impl 'cuda': serves CUDA tensors, not cpu"):
        apply_rule("topk", ids, weights, similarity=torch.eye(2), k0=1, impl="cuda")


@pytest.mark.parametrize(
    ("broken", "chosen"), [([], "triton"), (["triton"], "cuda"), (["triton", "cuda"], "torch")]
)
def test_what_auto_is_on_a_gpu(
    broken: list[str],
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first that builds; the log has what was passed over."""

    def load(name: str, device_type: str) -> str:
        if name in broken:
            raise BuildError(f"{name} is broken")
        return f"{name} on {device_type}"

    monkeypatch.setattr(rules, "_load", load)
    rules._auto.cache_clear()
    assert load_rules("auto", "cuda") == f"{chosen} on cuda"
    rules._auto.cache_clear()
    assert all(f"{name} is broken" in caplog.text for name in broken)
    assert bool(caplog.text) == bool(broken)


@pytest.mark.parametrize("impl_name", IMPLS)
def test_counts_what_it_did(impl_name: str) -> None:
    @settings(MANY, max_examples=60)
    @given(batches().filter(lambda b: b.rule != "similarity" and b.ids.shape[0] > 0))
    def run(batch: Batch) -> None:
        counters = torch.full((7,), 5, dtype=torch.int64)
        call = checked(batch.rule, batch.ids, batch.weights, **batch.options)
        routed = load_rules(impl_name, "cpu").apply(call, counters)
        case, want, valid = batch.case(), batch.expected(), call.num_valid
        before = {e for row in batch.ids[:valid].tolist() for e in row} - {-1}
        moved = (routed.ids != call.ids)[:valid].sum().item()
        fast = batch.options["fast"]
        speak = [t for t in range(valid) if fast is None or not fast[t]]
        energy = [lost_energy(case, e, g) for t in speak for e, g in want.lost[t].items()]
        lost = sum(energy) // valid if valid else 0
        loaded = set(routed.ids[:valid][routed.weights[:valid] != 0].tolist()) - {-1}
        did = [int(valid > 0), valid, len(before), len(loaded), moved, 0, lost]
        assert (counters - 5).tolist() == did

    run()
