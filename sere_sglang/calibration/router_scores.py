"""The router's scores of all experts, where only its logits and what it chose are at hand."""

from __future__ import annotations

import torch

from sere_sglang.runtime.rule_stage import SCORES

_APART = 0.01  # of a row's weights; they may be rounded to bfloat16
_ROWS = 0.98  # that must agree: others may tie, or hold weights of 0


def scores_behind(
    logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor | None:
    """float32 ``[n, E]``: of the functions that routers use, the one whose scores of the chosen
    experts are in proportion to their weights; None where that is none.

    Args:
        logits: floating ``[n, E]``. ids, weights: ``[n, K]``, distinct experts.
    """
    shares = _shares(weights.float())
    for function in SCORES.values():
        scores = function(logits)
        apart = (_shares(scores.gather(1, ids)) - shares).abs().amax(dim=1)
        if (apart < _APART).float().mean() >= _ROWS:
            return scores
    return None


def _shares(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
