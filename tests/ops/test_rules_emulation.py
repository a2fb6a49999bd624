"""The rules' CUDA kernels: their own source against the oracle, in every form, without a GPU.

The emulator resumes threads and starts blocks in random order, a new one at every launch, and
reports barriers that not all threads reach.
"""

from __future__ import annotations

import random

import pytest
import torch

from sere_sglang.names import RULES
from sere_sglang.ops.cuda.plan import Form, Plan, plan_rule
from sere_sglang.ops.rule_block import encode_rule
from sere_sglang.ops.rules import load_rules
from sere_sglang.ops.rules_call import LARGEST_TERM, MAX_ROWS, LostSlots, RuleCall
from sere_sglang.ops.rules_check import checked
from tests.ops.emulated import EmulatedRules
from tests.ops.rules_cases import RandomChoices, assert_routed_equal, check, large_call, make_batch

OTHERS = RULES[1:]
FORMS = {
    "block": Plan(Form.BLOCK, 1, 64),
    "one warp": Plan(Form.BLOCK, 1, 32),
    "cluster": Plan(Form.CLUSTER, 3, 64),
    "grid": Plan(Form.GRID, 4, 64),
}
"""Few threads, so that small inputs take several passes and blocks; up to 8 rows a block, 4 with
one warp."""


def rows_of(plan: Plan) -> int:
    """How many a plan takes."""
    return plan.blocks * 4 * plan.threads // 32


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_random_batches_equal_the_oracle(form: str, rule: str, seed: int) -> None:
    rng = random.Random(f"{form} {rule} {seed}")
    plan = FORMS[form]
    for _ in range(25):
        check(
            make_batch(RandomChoices(rng), rules=[rule], max_rows=rows_of(plan)),
            EmulatedRules(plan),
        )


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("shape", [
    (1, 1), (3, 2), (32, 32), (33, 17), (127, 31), (129, 8), (257, 9), (600, 10), (1023, 5),
], ids=str)  # fmt: skip
def test_sizes_that_fill_no_word_and_no_load_of_four(rule: str, shape: tuple[int, int]) -> None:
    """And every number of experts that a lane may hold."""
    if shape[1] == 1 and rule in ("piggyback", "topk"):
        pytest.skip("k0 < K")
    rng = random.Random(f"{rule} {shape}")
    for plan in FORMS.values():
        for _ in range(2):
            batch = make_batch(
                RandomChoices(rng), rules=[rule], max_rows=rows_of(plan), shape=shape
            )
            check(batch, EmulatedRules(plan))


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize(("clusters", "num_tokens", "shape", "form"), [
    (True, 8, (128, 8), Form.BLOCK),
    (True, 50, (128, 8), Form.CLUSTER),
    (False, 50, (512, 10), Form.GRID),
    (False, 100, (128, 8), Form.GRID),
    (False, 40, (1024, 32), Form.GRID),
])  # fmt: skip
def test_the_chosen_launch_equals_the_cpu(
    rule: str, clusters: bool, num_tokens: int, shape: tuple[int, int], form: Form
) -> None:
    plan = plan_rule(num_tokens, shape[0], clusters)
    assert plan.form is form
    call = large_call(rule, num_tokens, *shape, "cpu")
    got, want = EmulatedRules(plan).apply(call), load_rules("cpu", "cpu").apply(call)
    assert_routed_equal(got, want, is_power=False)


@pytest.mark.parametrize("rule", OTHERS)
def test_the_order_of_threads_and_blocks_does_not_matter(rule: str) -> None:
    """Every launch of the emulator has its own order."""
    call = large_call(rule, 30, 70, 6, "cpu")
    want = load_rules("cpu", "cpu").apply(call)
    for plan in (Plan(Form.CLUSTER, 8, 32), Plan(Form.GRID, 8, 32)):
        for _ in range(12):
            assert_routed_equal(EmulatedRules(plan).apply(call), want, is_power=False)


def test_a_row_that_lost_nothing_to_a_power_is_left_alone() -> None:
    ids = torch.tensor([[0, 1], [2, 3]])
    weights = torch.tensor([[0.75, 0.25], [0.9, 0.05]])
    call = checked("energy", ids, weights, similarity=torch.eye(4), loss=0.01, renormalize=0.5)
    for plan in FORMS.values():
        got = EmulatedRules(plan).apply(call)
        assert got.ids[0].tolist() == [0, 1] and torch.equal(got.weights[0], weights[0])
        factor = (0.95 / 0.9) ** 0.5
        torch.testing.assert_close(got.weights[1], torch.tensor([0.9 * factor, 0.0]))


@pytest.mark.parametrize("plan", [FORMS["block"], FORMS["grid"]], ids=["block", "grid"])
def test_largest_terms_saturate(plan: Plan) -> None:
    huge = float(LARGEST_TERM)
    ids = torch.tensor([[0, 1, 2]]).repeat(8, 1)
    weights = torch.tensor([[2 * huge, huge, 1e-3]]).repeat(8, 1)
    scores = torch.tensor([[huge, huge, 0.5, 0.25]]).repeat(8, 1)
    for options in ({"rule": "energy", "loss": 1.0}, {"rule": "budget", "budget": 3}):
        call = checked(topk_ids=ids, topk_weights=weights, scores=scores, **options)  # type: ignore[arg-type]
        want = load_rules("cpu", "cpu").apply(call)
        assert_routed_equal(EmulatedRules(plan).apply(call), want, is_power=False)


@pytest.mark.parametrize("form", FORMS)
def test_rows_lie_apart_and_classes_sleep(form: str) -> None:
    """Ids in front of shared-expert columns; classes in memory that the block does not ask for; no
    counters, no lost slots, no active experts."""
    call = large_call("energy", 4, 20, 4, "cpu")
    call = RuleCall(**{**vars(call), "protected": None, "fast": None})
    assert call.scores is not None
    ids = torch.full((4, 6), 77, dtype=torch.int32)
    weights = torch.full((4, 5), -7.0)
    ids[:, :4], weights[:, :4] = call.ids, call.weights
    block = encode_rule(
        "energy", num_valid=call.num_valid, loss=call.loss, fill_weight=0.5, renormalize=1.0
    )
    EmulatedRules(FORMS[form]).apply_(
        ids[:, :4], weights[:, :4], call.scores, block, 20,
        row_class=torch.tensor([1, 2, 3, 255], dtype=torch.uint8),
    )  # fmt: skip
    want = load_rules("cpu", "cpu").apply(call)
    assert torch.equal(ids[:, :4], want.ids) and torch.equal(weights[:, :4], want.weights)
    assert (ids[:, 4:] == 77).all() and (weights[:, 4:] == -7.0).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_block_that_names_similarity_changes_nothing(form: str) -> None:
    call = large_call("energy", 4, 20, 4, "cpu")
    ids, weights = call.ids.clone(), call.weights.clone()
    counters = torch.zeros(7, dtype=torch.int64)
    lost = LostSlots.none(ids)
    EmulatedRules(FORMS[form]).apply_(
        ids, weights, call.scores, encode_rule("similarity", num_valid=2, lost=True), 20,
        counters=counters, lost=lost,
    )  # fmt: skip
    assert torch.equal(ids, call.ids) and torch.equal(weights, call.weights)
    assert not counters.any() and not lost.weights.any()


def test_what_is_lost_is_written_where_the_block_asks_for_it() -> None:
    call = large_call("topk", 4, 20, 4, "cpu")
    for asks in (False, True):
        lost = LostSlots.none(call.ids)
        block = encode_rule("topk", keep=1, lost=asks)
        EmulatedRules(FORMS["block"]).apply_(
            call.ids.clone(), call.weights.clone(), None, block, 20, lost=lost
        )
        assert bool(lost.weights.any()) == asks


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", OTHERS)
def test_ids_that_are_no_experts_are_empty_slots(form: str, rule: str) -> None:
    """On a GPU values are not checked: what is out of range stays where it was."""
    call = large_call(rule, 4, 20, 4, "cpu")
    strange = call.ids.clone()
    strange[0, 1], strange[1, 0], strange[2, 3] = 20, -5, 1 << 30
    empty = torch.where((strange >= 0) & (strange < 20), strange, -1)
    options = vars(call) | {"num_valid": 4}
    got = EmulatedRules(FORMS[form]).apply(RuleCall(**(options | {"ids": strange})))
    want = EmulatedRules(FORMS[form]).apply(RuleCall(**(options | {"ids": empty})))
    is_expert = empty >= 0
    assert torch.equal(got.ids[is_expert], want.ids[is_expert])
    assert torch.equal(got.ids[~is_expert], strange[~is_expert])
    assert torch.equal(got.weights, want.weights) and torch.equal(got.active, want.active)


def test_every_size_has_a_launch_that_fits() -> None:
    for clusters in (True, False):
        for rows in [*range(1, 700), 1000, 1023, 1025, 4095, 4097, MAX_ROWS]:
            for experts in (8, 256, 257, 1024):
                plan = plan_rule(rows, experts, clusters)
                assert rows <= rows_of(plan), (plan, rows)
                assert clusters or plan.form is not Form.CLUSTER
                most = 512 if experts > 256 or plan.form is Form.GRID else 1024
                assert plan.threads <= most


def test_a_launch_that_does_not_fit_is_refused() -> None:
    call = large_call("energy", 9, 600, 4, "cpu")
    for plan in (FORMS["block"], Plan(Form.BLOCK, 1, 1024), Plan(Form.GRID, 1, 1024)):
        with pytest.raises(ValueError, match="9 rows of top-4 of 600 experts do not fit form"):
            EmulatedRules(plan).apply(call)
