"""The check of top-k and a rule in one launch: top-k's choices, and on them what the rule does by
itself.

Shared by the tests here and under ``tests/gpu``.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from sere_sglang.ops.cuda.rules_fused import Selected
from sere_sglang.ops.fused import softmax_topk
from sere_sglang.ops.rule_block import block_of, classes_of, encode_rule
from sere_sglang.ops.rules import load_rules
from sere_sglang.ops.rules_call import LostSlots, RuleCall

Fused = Callable[..., Selected]
"""(logits, top_k, renormalize, block, expert_loss, row_class, counters, lost)"""


def random_call(
    rule: str, selected: Selected, scores: torch.Tensor, rng: random.Random
) -> RuleCall:
    """A rule at some point, of rows that a router has chosen."""
    rows, top_k = selected.ids.shape
    device = selected.ids.device
    return RuleCall(
        rule=rule,
        ids=selected.ids,
        weights=selected.weights,
        num_experts=scores.shape[1],
        num_valid=rng.randint(0, rows),
        protected=torch.rand(rows).to(device) < 0.2,
        fast=torch.rand(rows).to(device) < 0.3,
        scores=scores,
        expert_loss=torch.rand(scores.shape[1]).to(device) * 3 if rule == "energy" else None,
        keep=rng.randint(1, max(1, top_k - 1)) if rule in ("piggyback", "topk") else 1,
        budget=rng.randint(1, scores.shape[1]),
        warmup=rng.random() < 0.5,
        truncate=rule == "budget" and rng.random() < 0.3,
        loss=rng.choice([0.0, 0.02, 0.2]),
        fill_weight=rng.choice([0.0, 0.5]),
        renormalize=1.0,
    )


def takes_scores(call: RuleCall) -> bool:
    return call.rule in ("piggyback", "budget") or (call.rule == "energy" and call.fill_weight > 0)


def check(
    fused: Fused, logits: torch.Tensor, top_k: int, renormalize: bool, rule: str, rng: random.Random
) -> None:
    """Top-k is the definition's; on its weights and scores the rule is the reference's, bit for
    bit."""
    device = logits.device
    switched_off = encode_rule("similarity").to(device)
    plain = fused(logits, top_k, renormalize, switched_off, None, None, None, None)
    weights, ids = softmax_topk(logits, top_k, renormalize)
    assert torch.equal(plain.ids, ids)
    torch.testing.assert_close(plain.weights, weights, rtol=2e-6, atol=1e-7)

    scores = logits.float().softmax(-1)
    call = random_call(rule, plain, scores, rng)
    counters, wanted = torch.zeros(2, 7, dtype=torch.int64, device=device)
    lost = LostSlots.none(plain.ids)
    block, classes = block_of(call).to(device), classes_of(call)
    got = fused(logits, top_k, renormalize, block, call.expert_loss, classes, counters, lost)
    if takes_scores(call):
        torch.testing.assert_close(got.scores, scores, rtol=2e-6, atol=1e-7)
        call = RuleCall(**{**vars(call), "scores": got.scores})
    want = load_rules("torch", device.type).apply(call, wanted)
    assert torch.equal(got.ids, want.ids) and torch.equal(got.weights, want.weights)
    assert want.lost is not None and torch.equal(lost.by_expert(logits.shape[1]), want.lost)
    assert torch.equal(counters, wanted)
