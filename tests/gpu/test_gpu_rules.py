"""The rules beside ``similarity`` on a GPU, in Triton and in CUDA C++: against the oracle, the
reference, and in a graph.

Triton's run on a CPU too, under TRITON_INTERPRET=1; the others' source does in
tests/ops/test_rules_emulation.py.
"""

from __future__ import annotations

import importlib
import os
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from sere_sglang.names import RULES
from sere_sglang.ops.cuda.plan import Form, Plan
from sere_sglang.ops.rule_block import block_of, classes_of, encode_rule
from sere_sglang.ops.rules import IMPLEMENTATIONS, load_rules
from sere_sglang.ops.rules_call import LostSlots
from tests.gpu.shared import not_for_this_gpu
from tests.ops.rules_cases import (
    RandomChoices,
    assert_routed_equal,
    check,
    large_call,
    make_batch,
)

if os.environ.get("TRITON_INTERPRET") == "1":
    DEVICE, IMPLS = "cpu", ["triton"]
elif torch.cuda.is_available():
    DEVICE, IMPLS = "cuda", ["triton", "cuda"]
else:
    pytest.skip("needs a CUDA GPU or TRITON_INTERPRET=1", allow_module_level=True)

OTHERS = RULES[1:]
# On a GPU Triton compiles anew for each shape, so they are few there.
SHAPES = [(5, 3), (40, 6)] if DEVICE == "cuda" else [None]
BATCHES = 25 if DEVICE == "cuda" else 40


@pytest.fixture(params=IMPLS)
def implementation(request: pytest.FixtureRequest) -> Any:
    """A module of `rules.IMPLEMENTATIONS`; one that does not build fails its tests."""
    reason = not_for_this_gpu(request.param)
    if reason is not None:
        pytest.skip(reason)
    try:
        return load_rules(request.param, DEVICE)
    except RuntimeError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(params=["one program", "many programs"])
def triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Small tiles make small cases take many turns, or many programs."""
    pytest.importorskip("triton")
    module = importlib.import_module(IMPLEMENTATIONS["triton"])
    one_program = request.param == "one program"
    if one_program and torch.version.hip:
        pytest.skip("AMD uses many programs only")
    monkeypatch.setattr(module, "SMALL_TILE_SLOTS", 64)
    monkeypatch.setattr(module, "LARGE_TILE_SLOTS", 64)
    monkeypatch.setattr(module, "SMALL_WIDE_TILE", 256)
    monkeypatch.setattr(module, "WIDE_TILE", 256)
    monkeypatch.setattr(module, "CHOOSE_TILE", 512)
    monkeypatch.setattr(module, "ONE_PROGRAM_SCORES", 2**30 if one_program else 0)
    return module


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_the_oracle(triton: Any, shape: tuple[int, int] | None) -> None:
    rng = random.Random(triton.ONE_PROGRAM_SCORES + (shape or (0,))[0])
    for _ in range(BATCHES):
        check(make_batch(RandomChoices(rng), shape=shape), triton, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("plan", [
    Plan(Form.BLOCK, 1, 192), Plan(Form.CLUSTER, 4, 64), Plan(Form.GRID, 7, 32),
], ids=str)  # fmt: skip
def test_cuda_equals_the_oracle(plan: Plan, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every form, whatever the size would ask for."""
    reason = not_for_this_gpu("cuda")
    if reason is not None:
        pytest.skip(reason)
    module: Any = load_rules("cuda", DEVICE)
    if plan.form is Form.CLUSTER and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need sm_90 or newer")
    monkeypatch.setattr(module, "plan_rule", lambda *_: plan)
    rng = random.Random(f"{plan.form} {rule}")
    for _ in range(40):
        batch = make_batch(RandomChoices(rng), rules=[rule], max_rows=24, max_experts=300, max_k=32)
        check(batch, module, DEVICE)


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("num_tokens", [8, 40])
def test_at_the_sizes_that_are_served(rule: str, num_tokens: int, implementation: Any) -> None:
    rng = random.Random(num_tokens)
    for _ in range(3):
        batch = make_batch(RandomChoices(rng), rules=[rule], max_rows=num_tokens, shape=(128, 8))
        check(batch, implementation, DEVICE)


@pytest.mark.skipif(DEVICE == "cpu", reason="too large for Triton's interpreter")
@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize(("num_tokens", "shape"), [
    (64, (128, 8)), (256, (512, 10)), (8192, (128, 8)), (1000, (1024, 16)),
])  # fmt: skip
def test_large_sizes_equal_the_reference(
    rule: str, num_tokens: int, shape: tuple[int, int], implementation: Any
) -> None:
    call = large_call(rule, num_tokens, *shape, DEVICE)
    want = load_rules("torch", DEVICE).apply(call)
    assert_routed_equal(implementation.apply(call), want, is_power=False)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [16, 100, 700])
def test_one_graph_serves_every_rule(num_tokens: int, implementation: Any) -> None:
    """The rule and its operating point change between replays, on the device alone."""
    call = large_call("energy", num_tokens, 64, 6, "cuda")
    assert call.scores is not None
    ids, weights = call.ids.clone(), call.weights.clone()
    block = encode_rule("similarity").cuda()
    row_class = torch.zeros(num_tokens, dtype=torch.uint8, device="cuda")
    counters = torch.zeros(7, dtype=torch.int64, device="cuda")
    lost = LostSlots.none(ids)

    def step() -> None:
        ids.copy_(call.ids)
        weights.copy_(call.weights)
        lost.weights.zero_()
        implementation.apply_(
            ids, weights, call.scores, block, 64, row_class=row_class, counters=counters, lost=lost
        )

    step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    rng = random.Random(7)
    for _ in range(24):
        rule = rng.choice(RULES)
        protected, fast = torch.rand(2, num_tokens).cuda() < 0.2
        own = replace(
            call, rule=rule, num_valid=rng.choice([1, num_tokens // 2, num_tokens]),
            protected=protected, fast=fast, keep=rng.choice([1, 2, 3]),
            budget=rng.choice([1, 20, 64]),
            loss=rng.choice([0.0, 0.01, 0.2]), fill_weight=rng.choice([0.0, 0.5]), renormalize=0.0,
        )  # fmt: skip
        block.copy_(block_of(own))
        classes = classes_of(own)
        assert classes is not None
        row_class.copy_(classes)
        counters.zero_()
        graph.replay()
        if rule == "similarity":  # of the other kernels
            assert torch.equal(ids, call.ids) and torch.equal(weights, call.weights)
            assert not lost.weights.any() and not counters.any()
            continue
        wanted = torch.zeros_like(counters)
        want = load_rules("torch", "cuda").apply(own, wanted)
        assert want.lost is not None
        assert torch.equal(ids, want.ids) and torch.equal(weights, want.weights)
        assert torch.equal(lost.by_expert(64), want.lost) and torch.equal(counters, wanted)
