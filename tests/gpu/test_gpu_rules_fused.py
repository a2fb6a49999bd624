"""Top-k and a rule in one launch, on a GPU; tests/ops/test_rules_fused.py has the emulator."""

from __future__ import annotations

import random

import pytest
import torch

from sere_sglang.names import RULES
from sere_sglang.ops.cuda import rules_fused
from sere_sglang.ops.rules_call import LostSlots
from tests.gpu.shared import SIZES, not_for_this_gpu
from tests.ops.fused_rule_cases import check

pytestmark = pytest.mark.gpu


def fused(
    logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    block: torch.Tensor,
    row_class: torch.Tensor | None,
    counters: torch.Tensor | None,
    lost: LostSlots | None,
) -> rules_fused.Selected:
    return rules_fused.fused_topk_rule(
        logits, top_k, renormalize, block, row_class=row_class, counters=counters, lost=lost
    )


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    reason = not_for_this_gpu("cuda")
    if reason is not None:
        pytest.skip(reason)
    rules_fused.build()


@pytest.mark.parametrize("num_tokens", [1, 20, 70, 300, 1025])
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_top_k_and_then_the_rule(num_experts: int, top_k: int, num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    rng = random.Random(num_tokens)
    for rule in RULES[1:]:
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        logits = 3 * torch.randn(num_tokens, num_experts)
        check(fused, logits.to(dtype).cuda(), top_k, num_tokens % 2 == 0, rule, rng)
