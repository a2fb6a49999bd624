"""What `apply_rule` refuses, and that it names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sere_sglang import apply_rule
from sere_sglang.ops.rules_call import MAX_ROWS
from sere_sglang.ops.rules_check import checked

GOOD: dict[str, Any] = {"scores": torch.full((2, 4), 0.25), "similarity": torch.eye(4)}


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("best", {}, "rule 'best' is none of: similarity, piggyback"),
        ("piggyback", {"k0": 1, "scores": None}, "scores is missing: rule 'piggyback' needs"),
        ("budget", {"budget": 2, "scores": None}, "scores is missing"),
        ("energy", {"loss": 0.1, "fill_weight": 0.5, "scores": None}, "scores is missing"),
        ("topk", {"k0": 1, "scores": None, "similarity": None}, "scores is missing"),
        ("similarity", {"primary_k": 1, "similarity": None}, "similarity is missing"),
        ("similarity", {}, "primary_k is missing"),
        ("topk", {}, "k0 is missing"),
        ("topk", {"k0": 2}, r"k0 must be in \[1, K=2\), got 2"),
        ("piggyback", {"k0": 0}, r"k0 must be in \[1, K=2\), got 0"),
        ("budget", {"budget": 0}, r"budget must be in \[1, E=4\], got 0"),
        ("budget", {"budget": 5}, r"budget must be in \[1, E=4\], got 5"),
        ("budget", {"budget": 2, "fill": "zero"}, "fill 'zero' is none of: piggyback, truncate"),
        ("energy", {}, "loss is missing"),
        ("energy", {"loss": 1.5}, r"loss must be in \[0, 1\], got 1.5"),
        ("energy", {"loss": float("nan")}, "loss must be in"),
        ("energy", {"loss": 0.1, "fill_weight": -1.0}, "fill_weight must be in"),
        ("energy", {"loss": 0.1, "renormalize": 2.0}, "renormalize must be in"),
        ("topk", {"k0": 1, "num_valid": 3}, r"num_valid must be in \[0, T=2\]"),
        ("topk", {"k0": 1, "protected": torch.zeros(3, dtype=torch.bool)}, "protected must be"),
        ("topk", {"k0": 1, "scores": torch.ones(3, 4)}, "scores must be"),
        ("topk", {"k0": 1, "scores": torch.full((2, 4), float("nan"))}, "scores contains NaN"),
        ("topk", {"k0": 1, "scores": -torch.ones(2, 4)}, "not the logits"),
        (
            "topk",
            {"k0": 1, "scores": torch.full((2, 4), 1e300, dtype=torch.float64)},
            "scores contains NaN",
        ),
        (
            "topk",
            {"k0": 1, "topk_weights": torch.full((2, 2), 1e300, dtype=torch.float64)},
            "topk_weights con",
        ),
        (
            "energy",
            {"loss": 0.1, "scores": torch.ones(2, 0), "similarity": None},
            "scores has no experts",
        ),
        ("topk", {"k0": 1, "topk_weights": torch.full((2, 2), float("nan"))}, "topk_weights cont"),
        ("topk", {"k0": 1, "topk_ids": torch.tensor([[0, 1], [3, 3]])}, "twice in row 1"),
        ("topk", {"k0": 1, "topk_ids": torch.tensor([[0, 1], [3, 4]])}, "topk_ids must be -1 or"),
        ("topk", {"k0": 1, "impl": "fast"}, "impl 'fast' is no implementation"),
    ],
)
def test_bad_input_names_the_argument(rule: str, options: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {
        "topk_ids": torch.tensor([[0, 1], [2, -1]]),
        "topk_weights": torch.tensor([[0.5, 0.5], [1.0, 0.0]]),
        **GOOD,
        **options,
    }
    with pytest.raises(ValueError, match=message):
        apply_rule(rule, **given_)


@pytest.mark.parametrize(
    "name",
    ["topk_ids", "topk_weights", "scores", "similarity", "expert_loss", "protected", "fast"],
)
def test_what_is_no_tensor_is_named(name: str) -> None:
    arguments: dict[str, Any] = {
        "topk_ids": torch.tensor([[0, 1]]),
        "topk_weights": torch.tensor([[0.5, 0.5]]),
        "scores": torch.full((1, 4), 0.25),
    }
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
        checked("topk", k0=1, **(arguments | {name: [[0.5, 0.5]]}))


@pytest.mark.parametrize(
    ("expert_loss", "message"),
    [
        (torch.ones(3), r"expert_loss must be \[E\] = \[4\], got \[3\]"),
        (-torch.ones(4), "expert_loss contains NaN, infinity or a value below 0"),
        (torch.full((4,), float("inf")), "expert_loss contains NaN"),
    ],
)
def test_a_wrong_expert_loss_is_named(expert_loss: torch.Tensor, message: str) -> None:
    ids, weights = torch.tensor([[0, 1], [2, -1]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    with pytest.raises(ValueError, match=message):
        checked("energy", ids, weights, scores=torch.ones(2, 4), loss=0.1, expert_loss=expert_loss)


def test_more_rows_than_the_sums_hold_are_refused() -> None:
    ids, weights = torch.zeros(MAX_ROWS + 1, 1).int(), torch.ones(MAX_ROWS + 1, 1)
    with pytest.raises(ValueError, match="8193 rows; at most 8192"):
        apply_rule("energy", ids, weights, similarity=torch.eye(2), loss=0.1)
