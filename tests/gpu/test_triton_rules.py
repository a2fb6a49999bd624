"""The rules beside ``similarity`` in Triton: against the oracle, the reference, and in a graph.

On a GPU, or on a CPU under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from sere_sglang.names import RULES
from sere_sglang.ops import rules_triton as implementation
from sere_sglang.ops.rule_block import encode_rule
from sere_sglang.ops.rules import applied, load_rules
from sere_sglang.ops.rules_call import LostSlots, Routed, RuleCall
from tests.ops.rules_cases import Batch, RandomChoices, make_batch

if implementation.rerouting.phases.INTERPRETED:
    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    pytest.skip("needs a CUDA GPU or TRITON_INTERPRET=1", allow_module_level=True)

# On a GPU Triton compiles anew for each shape, so they are few there.
SHAPES = [(5, 3), (40, 6)] if DEVICE == "cuda" else [None]
BATCHES = 25 if DEVICE == "cuda" else 40


def check(batch: Batch) -> None:
    """Ids, active experts and what was lost are the oracle's and the reference's, bit for bit;
    weights are the reference's, up to the rounding of a power."""
    (got, count), (want, wanted) = run(batch.call(DEVICE), "triton"), run(batch.call(), "torch")
    oracle = batch.expected()
    assert torch.equal(count, wanted)
    assert got.ids.tolist() == want.ids.tolist() == oracle.ids
    assert set(got.active.nonzero().flatten().tolist()) == oracle.active
    is_power = batch.rule == "energy" and 0.0 < batch.options["renormalize"] < 1.0
    torch.testing.assert_close(
        got.weights.cpu(), want.weights, rtol=3e-6 if is_power else 0, atol=0, equal_nan=True
    )
    assert (got.lost is None) == (want.lost is None)
    if got.lost is not None and want.lost is not None:
        assert torch.equal(got.lost.cpu(), want.lost)


def run(call: RuleCall, impl: str) -> tuple[Routed, torch.Tensor]:
    """The result, and the counters; of similarity these are its own kernels'."""
    counters = torch.full((7,), 3, dtype=torch.int64, device=call.ids.device)
    if call.rule == "similarity" or call.ids.numel() == 0:
        return applied(call, impl), counters.cpu()
    return load_rules(impl, call.ids.device.type).apply(call, counters), counters.cpu()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["one program", "many programs"])
def test_equals_the_oracle(
    form: str, shape: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small tiles make small cases take many turns, or many programs."""
    one_program = form == "one program"
    if one_program and torch.version.hip:
        pytest.skip("AMD uses many programs only")
    monkeypatch.setattr(implementation, "SMALL_TILE_SLOTS", 64)
    monkeypatch.setattr(implementation, "LARGE_TILE_SLOTS", 64)
    monkeypatch.setattr(implementation, "SMALL_WIDE_TILE", 256)
    monkeypatch.setattr(implementation, "WIDE_TILE", 256)
    monkeypatch.setattr(implementation, "CHOOSE_TILE", 512)
    monkeypatch.setattr(implementation, "ONE_PROGRAM_SCORES", 2**30 if one_program else 0)
    rng = random.Random(len(form) + (shape or (0,))[0])
    for _ in range(BATCHES):
        check(make_batch(RandomChoices(rng), shape=shape))


@pytest.mark.parametrize("rule", RULES[1:])
@pytest.mark.parametrize("num_tokens", [8, 40])
def test_at_the_tiles_that_are_served(rule: str, num_tokens: int) -> None:
    rng = random.Random(num_tokens)
    for _ in range(3):
        check(make_batch(RandomChoices(rng), rules=[rule], max_rows=num_tokens, shape=(128, 8)))


@pytest.mark.skipif(DEVICE == "cpu", reason="too large for Triton's interpreter")
@pytest.mark.parametrize("rule", RULES[1:])
@pytest.mark.parametrize(("num_tokens", "shape"), [
    (64, (128, 8)), (256, (512, 10)), (8192, (128, 8)), (1000, (1024, 16)),
])  # fmt: skip
def test_large_sizes_equal_the_reference(
    rule: str, num_tokens: int, shape: tuple[int, int]
) -> None:
    call = large_call(rule, num_tokens, *shape)
    got = load_rules("triton", DEVICE).apply(call)
    want = load_rules("torch", DEVICE).apply(call)
    for name, tensor in want._asdict().items():
        assert torch.equal(getattr(got, name), tensor), name


def large_call(rule: str, num_tokens: int, experts: int, top_k: int) -> RuleCall:
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_tokens, experts, generator=generator)
    scores = (logits + torch.randn(experts, generator=generator)).softmax(-1).to(DEVICE)
    weights, ids = scores.topk(top_k)
    return RuleCall(
        rule=rule,
        ids=ids.to(torch.int32),
        weights=weights / weights.sum(1, keepdim=True),
        num_experts=experts,
        num_valid=num_tokens - num_tokens // 9,
        protected=torch.rand(num_tokens, generator=generator).to(DEVICE) < 0.01,
        fast=torch.rand(num_tokens, generator=generator).to(DEVICE) < 0.2,
        scores=scores,
        keep=2 if rule in ("piggyback", "topk") else 1,
        budget=experts // 3,
        loss=0.05,
        fill_weight=0.5,
        renormalize=1.0,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [16, 700])
def test_one_graph_serves_every_rule(num_tokens: int) -> None:
    """The rule and its operating point change between replays, on the device alone."""
    call = large_call("energy", num_tokens, 64, 6)
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
        valid = rng.choice([1, num_tokens // 2, num_tokens])
        masks = {name: torch.rand(num_tokens) < 0.2 for name in ("protected", "fast")}
        own = RuleCall(
            rule=rule, ids=call.ids, weights=call.weights, num_experts=64, num_valid=valid,
            protected=masks["protected"].cuda(), fast=masks["fast"].cuda(), scores=call.scores,
            keep=rng.choice([1, 2, 3]), budget=rng.choice([1, 20, 64]),
            loss=rng.choice([0.0, 0.01, 0.2]), fill_weight=rng.choice([0.0, 0.5]),
        )  # fmt: skip
        block.copy_(implementation.block_of(own))
        classes = implementation.classes_of(own)
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
