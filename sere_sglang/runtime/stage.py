"""The re-routing stage of one MoE layer: between SGLang's top-k and everything after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sere_sglang.ops import LayerTable, reroute_
from sere_sglang.ops.fused import LOGIT_DTYPES, fused_topk_reroute
from sere_sglang.runtime.graph_rules import GraphRules
from sere_sglang.runtime.rule_stage import RuleForward, RuleStage

_ATTRIBUTE = "_sere_stage"


@dataclass
class Switch:
    """Host-side mirror of 'enabled', shared by all stages.

    While True the kernel is launched and reads the control block; while False an eager forward
    does not even launch it. True by default, so that graph capture always records the launch.

    rule: what the coming forward runs at under a rule beside ``similarity``; None under that one.
    captures: a graph is being captured, which will run under every rule that the server has.
    """

    launch: bool = True
    rule: RuleForward | None = None
    captures: bool = False

    def off(self) -> None:
        """Exact routing, and nothing is launched."""
        self.launch, self.rule = False, None


@dataclass
class RerouteStage:
    """Everything layer `layer_id` needs to re-route its `top_k` routed slots in place.

    control: int32 [16]; row_class: uint8 [>= rows]; counters: int64 [6]; all on the layer's
    device (ops.control, ops.counters).
    """

    layer_id: int
    top_k: int
    table: LayerTable
    control: torch.Tensor
    row_class: torch.Tensor
    counters: torch.Tensor
    switch: Switch
    impl: str = "auto"
    fuse: bool = False
    """Plain softmax routers: top-k and re-routing in one launch (`run_fused`)."""
    distinct: bool = True
    """Rows hold no expert twice, as most runners need it (`runtime.runners`)."""
    rules: RuleStage | GraphRules | None = None
    """The rules beside ``similarity``, where they can be had."""
    ran: bool = field(default=False, init=False)
    fused_ids: torch.Tensor | None = field(default=None, init=False)
    """What `run_fused` returned; `run` has nothing left to do for it."""

    def run(
        self,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        logits: torch.Tensor | None = None,
        topk_config: Any = None,
    ) -> None:
        """Re-route topk_ids [T, K (+ fused shared slots)] in place.

        topk_weights, alike, change with them where rows stay distinct. logits: [T, E] of the
        router `topk_config`.
        """
        self.ran = True  # written, never read here: what torch.compile reads, it compiles again for
        if not self.switch.launch or topk_ids.shape[0] == 0:
            return
        if self.fused_ids is not None and self.fused_ids is topk_ids:
            return
        ids = topk_ids[:, : self.top_k]  # fused shared experts are the columns behind
        weights = topk_weights[:, : self.top_k]
        rule, rules, captures = self.switch.rule, self.rules, self.switch.captures
        if rule is not None and isinstance(rules, RuleStage):
            rules.apply(ids, weights, logits, topk_config, rule)
            return
        # Some CPU routers leave torch.topk's int64; the kernels take int32 with any row stride.
        ids32, weights32 = ids.to(torch.int32), weights.to(torch.float32)
        # Above the classes' number of rows the control block names one class only.
        row_class = self.row_class if ids32.shape[0] <= self.row_class.shape[0] else None
        if captures or rule is None:
            reroute_(
                ids32,
                weights32,
                self.table,
                self.control,
                row_class=row_class,
                counters=self.counters,
                distinct=self.distinct,
                impl=self.impl,
            )
        if isinstance(rules, GraphRules) and (captures or rule is not None):
            forward = None if captures else rule
            rules.apply(ids32, weights32, row_class, logits, topk_config, forward)
        if ids32 is not ids:
            ids.copy_(ids32)
        if weights32 is not weights:
            weights.copy_(weights32)

    def can_fuse(self, router_logits: torch.Tensor, top_k: int) -> bool:
        """Whether `run_fused` may stand in for the router on logits [T, E]."""
        return (
            self.fuse
            and self.switch.launch
            and top_k == self.top_k
            and router_logits.dtype in LOGIT_DTYPES
            and 0 < router_logits.shape[0] <= self.row_class.shape[0]
            and router_logits.shape[1] == self.table.num_experts
            and router_logits.stride(1) == 1
        )

    def run_fused(
        self, router_logits: torch.Tensor, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights float32 [T, K] and re-routed ids int32 [T, K] of a plain softmax router."""
        weights, self.fused_ids = fused_topk_reroute(
            router_logits,
            self.top_k,
            renormalize,
            self.table,
            self.control,
            row_class=self.row_class,
            counters=self.counters,
            distinct=self.distinct,
        )
        return weights, self.fused_ids


def bind_stage(part: Any, stage: RerouteStage) -> None:
    """Attach `stage` to SGLang's ``TopKConfig`` or ``FusedMoE``, which reach the seams."""
    setattr(part, _ATTRIBUTE, stage)


def stage_of(part: Any) -> RerouteStage | None:
    """The stage bound to it; None for draft models and servers without SERE."""
    return getattr(part, _ATTRIBUTE, None)
