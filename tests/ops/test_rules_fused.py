"""Top-k and a rule in one launch: the kernels' own source in the emulator."""

from __future__ import annotations

import random

import pytest
import torch

from sere_sglang.names import RULES
from sere_sglang.ops.cuda.plan import Form, Plan, plan_rule
from sere_sglang.ops.cuda.rules_fused import fused_topk_rule
from sere_sglang.ops.rule_block import encode_rule
from tests.ops import emulated
from tests.ops.fused_rule_cases import Fused, check

OTHERS = RULES[1:]
PLANS = [Plan(Form.BLOCK, 1, 64), Plan(Form.CLUSTER, 3, 64), Plan(Form.GRID, 4, 64)]


def emulated_at(plan: Plan) -> Fused:
    return lambda *arguments: emulated.fused_rule(plan, *arguments)


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_top_k_and_then_the_rule(plan: Plan, rule: str) -> None:
    rng = random.Random(f"{plan.form} {rule}")
    torch.manual_seed(rng.randint(0, 1000))
    for _ in range(12):
        top_k = rng.randint(2, 9)
        rows, experts = rng.randint(1, 8 * plan.blocks), rng.randint(top_k, 150)
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        logits = 3 * torch.randn(rows, experts)
        if rng.random() < 0.3:
            logits = logits.round()  # ties
        check(emulated_at(plan), logits.to(dtype), top_k, rng.random() < 0.5, rule, rng)


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("shape", [(1024, 32), (600, 10), (257, 17)], ids=str)
def test_more_experts_than_a_lane_loads_at_once(shape: tuple[int, int], rule: str) -> None:
    torch.manual_seed(shape[0])
    for plan in PLANS:
        logits = torch.randn(7, shape[0] + 3)[:, : shape[0]]  # rows lie apart
        check(emulated_at(plan), logits, shape[1], True, rule, random.Random(shape[0]))


@pytest.mark.parametrize("clusters", [True, False])
def test_the_chosen_launch(clusters: bool) -> None:
    torch.manual_seed(1)
    for rows, experts, top_k in ((8, 128, 8), (70, 512, 10)):
        plan = plan_rule(rows, experts, clusters)
        check(
            emulated_at(plan),
            torch.randn(rows, experts),
            top_k,
            True,
            "piggyback",
            random.Random(rows),
        )


def test_what_it_does_not_serve_is_named() -> None:
    logits, block = torch.zeros(2, 8), encode_rule("topk")
    with pytest.raises(RuntimeError, match="fused top-k and rule: serves CUDA tensors, not cpu"):
        fused_topk_rule(logits, 2, True, block)
    with pytest.raises(ValueError, match="top_k must be 1 to 32 and at most E=8, got 9"):
        fused_topk_rule(logits, 9, True, block)
    with pytest.raises(ValueError, match="block"):
        fused_topk_rule(logits, 2, True, block[:8])
    with pytest.raises(ValueError, match="T <= 8192"):
        fused_topk_rule(torch.zeros(8193, 8), 2, True, block)
