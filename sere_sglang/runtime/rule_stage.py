"""The rules beside ``similarity`` in one MoE layer of the CPU engine.

Their operating point is read on the host, so a captured CUDA graph could not follow it: on a GPU
graph_rules.py does the same by what the device holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sere_sglang.names import RowClass
from sere_sglang.ops.rules import Implementation
from sere_sglang.ops.rules_call import RuleCall
from sere_sglang.ops.surrogates import Compensation, Surrogates, compensate_
from sere_sglang.profile.rule_errors import UNFITTED, EnergyWeights
from sere_sglang.schedule.point import OperatingPoint

SCORES = {
    "softmax": lambda logits: logits.softmax(dim=-1, dtype=torch.float32),  # one launch
    "sigmoid": lambda logits: logits.float().sigmoid(),
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits.float()).sqrt(),
}
"""``TopKConfig.scoring_func`` -> scores of all experts, as SGLang's routers compute them."""


@dataclass(frozen=True)
class RuleForward:
    """What the rows of one forward run at.

    num_valid: rows that are no padding; -1: all. classes: uint8 ``[rows]``, a `RowClass` for each
    valid row, or None. fast_keep: S of fast rows.
    """

    point: OperatingPoint
    num_valid: int
    classes: torch.Tensor | None
    fast_keep: int
    surrogates: bool


def options_of(
    point: OperatingPoint,
    *,
    num_experts: int,
    loss_unit: float,
    fast_keep: int,
    compensates: bool,
    has_scores: bool,
    weights: EnergyWeights,
) -> dict[str, Any]:
    """Of a layer's own point: the options of `RuleCall` and `encode_rule` that say how hard.

    Args:
        num_experts, loss_unit: as `RuleStage`.
        fast_keep: S of fast rows.
        compensates: surrogates make up for what is lost.
        has_scores: the router exposes what lost slots can be filled by.
        weights: the layer's.
    """
    fills = point.rule == "energy" and has_scores and not compensates
    return {
        "keep": point.primary_k or 1,
        "fast_keep": fast_keep if point.primary_k else 1,
        "budget": min(point.experts, num_experts) or num_experts,
        "loss": point.loss * loss_unit,
        "fill_weight": weights.fill if fills else 0.0,
        "renormalize": 0.0 if compensates else weights.renormalize,
    }


@dataclass
class RuleStage:
    """Everything a layer needs to apply a rule to its `top_k` routed slots in place.

    loss_unit: squared routing weight per row that a loss budget of 1 is: the square of what a row's
        weights add up to, times the layer's share of loss budgets (`profile.loss_shares`).
    share: of what the surrogates compute, this rank's; ranks add their outputs up.
    weights: of ``energy`` without surrogates.
    expert_loss: float32 ``[E]``, of ``energy`` with them (`profile.loss_shares`).
    counters: int64 ``[7]`` (`Implementation.apply`).
    """

    layer_id: int
    num_experts: int
    loss_unit: float
    implementation: Implementation
    counters: torch.Tensor
    surrogates: Surrogates | None = None
    share: float = 1.0
    weights: EnergyWeights = UNFITTED
    expert_loss: torch.Tensor | None = None
    lost: torch.Tensor | None = field(default=None, init=False)
    """Of the forward that is running, until `take_compensation` has used it up."""

    @torch.compiler.disable
    def apply(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor,
        logits: torch.Tensor | None,
        topk_config: Any,
        forward: RuleForward,
    ) -> None:
        """Change ids ``[T, K]`` and weights ``[T, K]``. logits: ``[T, E]`` of the router."""
        self.lost = None
        point = forward.point.at(self.layer_id)
        if not point.enabled:
            return
        rows = ids.shape[0]
        valid = rows if forward.num_valid < 0 else min(forward.num_valid, rows)
        compensates = point.rule == "energy" and forward.surrogates and self.surrogates is not None
        scores = None
        if point.rule != "topk" and not compensates:
            scores = scores_of(logits, topk_config, self.num_experts)
        routed = self.implementation.apply(
            RuleCall(
                rule=point.rule,
                ids=ids.to(torch.int32).contiguous(),
                weights=weights.to(torch.float32).contiguous(),
                num_experts=self.num_experts,
                num_valid=valid,
                protected=_rows_of(RowClass.EXACT, forward.classes, rows),
                fast=_rows_of(RowClass.FAST, forward.classes, rows),
                scores=scores,
                expert_loss=self.expert_loss if compensates else None,
                **options_of(
                    point,
                    num_experts=self.num_experts,
                    loss_unit=self.loss_unit,
                    fast_keep=forward.fast_keep,
                    compensates=compensates,
                    has_scores=scores is not None,
                    weights=self.weights,
                ),
            ),
            self.counters,
        )
        ids.copy_(routed.ids)
        weights.copy_(routed.weights)
        self.lost = routed.lost if compensates else None

    def take_compensation(self) -> Compensation | None:
        """Of the forward that is running, once; None where nothing was lost."""
        lost, self.lost = self.lost, None
        if lost is None or self.surrogates is None:
            return None
        return Compensation(lost, self.surrogates, self.share)

    def compensation(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """What `add_compensation` takes, from a layer's input ``[T, H]``; None where nothing was
        lost. The CPU engine's runners leave their input as it is."""
        return None if self.lost is None else hidden

    def add_compensation(self, output: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output ``[T, H]`` with this rank's share of what its tokens lost, where its
        runner has not taken and added that."""
        compensation = self.take_compensation()
        if compensation is None:
            return output
        added = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        compensate_(added, hidden, compensation)
        return output.add_(added)


def scores_of(
    logits: torch.Tensor | None, topk_config: Any, num_experts: int
) -> torch.Tensor | None:
    """float32 ``[T, E]`` of a router's logits; None where it exposes none."""
    if logits is None or not exposes_scores(topk_config) or logits.shape[-1] != num_experts:
        return None
    return SCORES[topk_config.scoring_func](logits).contiguous()


def exposes_scores(topk_config: Any) -> bool:
    """Whether a ``TopKConfig`` says how its router makes scores of logits."""
    return topk_config.custom_routing_function is None and topk_config.scoring_func in SCORES


def _rows_of(kind: RowClass, classes: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """bool ``[rows]``; None where no row is of that class. Rows behind `classes` are padding."""
    if classes is None:
        return None
    own = torch.zeros(rows, dtype=torch.bool)
    own[: len(classes)] = classes[:rows] == kind
    return own
