"""The rules beside ``similarity`` in one MoE layer on a GPU: what to do is read on the device.

So one captured CUDA graph serves every rule and every operating point (`ops.rule_block`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from sere_sglang.names import SIMILARITY
from sere_sglang.ops.rule_block import RULE_WORDS, encode_rule
from sere_sglang.ops.rule_ops import add_compensation_, apply_rule_, begin_compensation
from sere_sglang.ops.rules_call import MAX_ROWS, LostSlots
from sere_sglang.ops.surrogates import Surrogates
from sere_sglang.profile.rule_errors import UNFITTED, EnergyWeights
from sere_sglang.runtime.rule_stage import RuleForward, options_of, scores_of
from sere_sglang.schedule.point import OperatingPoint


@dataclass(frozen=True)
class RuleWords:
    """How a layer's rule block is written.

    num_experts, loss_unit: as `RuleStage`. has_scores: its router exposes them.
    has_surrogates: of its experts. weights: of ``energy`` without them.
    """

    num_experts: int
    loss_unit: float
    has_scores: bool
    has_surrogates: bool
    weights: EnergyWeights = UNFITTED

    def of(
        self, point: OperatingPoint, *, fast_keep: int, surrogates: bool, classes: bool
    ) -> np.ndarray:
        """int32 ``[16]`` of the layer's own point, for any number of rows; see `RuleForward`.
        classes: rows have classes."""
        if not point.enabled or point.rule == SIMILARITY:
            return np.zeros(RULE_WORDS, dtype=np.int32)
        compensates = self.compensates(point.rule, surrogates)
        options = options_of(
            point,
            num_experts=self.num_experts,
            loss_unit=self.loss_unit,
            fast_keep=fast_keep,
            compensates=compensates,
            has_scores=self.has_scores,
            weights=self.weights,
        )
        return encode_rule(point.rule, lost=compensates, classes=classes, **options).numpy()

    def compensates(self, rule: str, surrogates: bool) -> bool:
        return rule == "energy" and surrogates and self.has_surrogates


class Begun(NamedTuple):
    """Of a layer that runs: what its surrogates made of its input, and what was lost."""

    inner: torch.Tensor  # float32 [T, K, r]
    lost: LostSlots


@dataclass
class GraphRules:
    """Everything a layer needs to apply what its rule block says to its routed slots in place.

    block: int32 ``[16]`` (`RuleWords`). counters: int64 ``[7]`` (`Implementation.apply`). share: of
    what the surrogates compute, this rank's, times what its runner multiplies its output by.
    expert_loss: float32 ``[E]`` where there are surrogates (`profile.loss_shares`).
    """

    layer_id: int
    words: RuleWords
    block: torch.Tensor
    counters: torch.Tensor
    surrogates: Surrogates | None = None
    share: float = 1.0
    expert_loss: torch.Tensor | None = None
    lost: LostSlots | None = field(default=None, init=False)
    """Of the forward that is running, until `compensation` has used it up."""

    @property
    def loss_unit(self) -> float:
        return self.words.loss_unit

    def apply(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor,
        row_class: torch.Tensor | None,
        logits: torch.Tensor | None,
        topk_config: Any,
        forward: RuleForward | None,
    ) -> None:
        """Change ids int32 ``[T, K]`` and weights float32 ``[T, K]``.

        logits: ``[T, E]`` of the router. forward: None while a graph is captured, which will run
        under every rule.
        """
        self.lost = None
        if ids.shape[0] > MAX_ROWS:
            return  # sums over so many rows may not fit: exact (docs/semantics.md)
        compensates = self.surrogates is not None and (
            forward is None or self.words.compensates(forward.point.rule, forward.surrogates)
        )
        scores = None
        fills = forward is None or not (forward.point.rule == "topk" or compensates)
        if self.words.has_scores and fills:
            scores = scores_of(logits, topk_config, self.words.num_experts)
            if scores is None:
                raise ValueError(
                    f"MoE layer {self.layer_id}: its router's logits [T, {self.words.num_experts}] "
                    "do not come with its top-k, so no rule beside similarity can be served; "
                    "add --sere-rule similarity"
                )
        if compensates:
            self.lost = LostSlots.none(ids)
        apply_rule_(
            ids,
            weights,
            scores,
            self.block,
            self.words.num_experts,
            expert_loss=self.expert_loss,
            row_class=row_class,
            counters=self.counters,
            lost=self.lost,
        )

    def compensation(self, hidden: torch.Tensor) -> Begun | None:
        """What `add_compensation` takes, from a layer's input ``[T, H]`` before it runs."""
        lost, self.lost = self.lost, None
        if lost is None or self.surrogates is None:
            return None
        return Begun(begin_compensation(hidden, lost, self.surrogates, self.share), lost)

    def add_compensation(self, output: torch.Tensor, compensation: Begun) -> torch.Tensor:
        """The layer's output ``[T, H]`` with this rank's share of what its tokens lost."""
        assert self.surrogates is not None
        add_compensation_(output, *compensation, self.surrogates, self.share)
        return output
