"""The rules beside ``similarity`` of a model's layers: which can be had, and what they need."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sere_sglang.names import AUTO, RULES, SIMILARITY
from sere_sglang.ops.rule_ops import why_unavailable
from sere_sglang.ops.rules import load_rules
from sere_sglang.ops.surrogates import Surrogates
from sere_sglang.options import SereConfig
from sere_sglang.profile import SereProfile
from sere_sglang.profile.loss_shares import expert_loss
from sere_sglang.profile.rule_errors import energy_weights
from sere_sglang.runtime.graph_rules import GraphRules, RuleWords
from sere_sglang.runtime.rule_stage import RuleStage, exposes_scores
from sere_sglang.runtime.runners import output_factor, output_share, scales_weights
from sere_sglang.schedule.auto_rule import RuleChoice, choose_rule

logger = logging.getLogger(__name__)

OTHERS = tuple(rule for rule in RULES if rule != SIMILARITY)


@dataclass(frozen=True)
class LayerRules:
    """What the rules need to know of one layer; see `RuleStage` and `RuleWords`."""

    layer_id: int
    words: RuleWords
    surrogates: Surrogates | None
    share: float
    expert_loss: torch.Tensor | None

    def on_host(self, counters: torch.Tensor) -> RuleStage:
        """For the CPU engine."""
        return RuleStage(
            layer_id=self.layer_id,
            num_experts=self.words.num_experts,
            loss_unit=self.words.loss_unit,
            implementation=load_rules("auto", "cpu"),
            counters=counters,
            surrogates=self.surrogates,
            share=self.share,
            weights=self.words.weights,
            expert_loss=self.expert_loss,
        )

    def in_graphs(self, block: torch.Tensor, counters: torch.Tensor) -> GraphRules:
        """For a GPU; block: where its words will be."""
        return GraphRules(
            self.layer_id,
            self.words,
            block,
            counters,
            self.surrogates,
            self.share,
            self.expert_loss,
        )


def resolve_rules(
    device_type: str,
    config: SereConfig,
    layers: Mapping[int, Any],
    configs: Mapping[int, Any],
    profile: SereProfile,
) -> tuple[RuleChoice, str, dict[str, str]]:
    """What ``auto`` is here; the rule that the server starts under; and `unavailable_rules` of it.

    layers: layer id -> ``FusedMoE``. configs: layer id -> ``TopKConfig``.
    """
    unavailable = unavailable_rules(device_type, config.rule, configs)
    not_at_start = {}
    if config.policy == "static":  # whose B nobody can have given
        not_at_start["budget"] = "--sere-policy static needs --sere-max-experts"
    auto = choose_rule(
        profile,
        has_scores=all(map(exposes_scores, configs.values())),
        unavailable=not_at_start | unavailable,
        surrogates=config.sere_surrogates is not False
        and all(output_factor(layers[i], configs[i]) is not None for i in configs),
    )
    rule = auto.rule if config.rule == AUTO else config.rule
    return auto, rule, unavailable_rules(device_type, rule, configs)


def unavailable_rules(device_type: str, asked: str, configs: Mapping[int, Any]) -> dict[str, str]:
    """Rule -> why a server started under rule `asked` cannot be had under it.

    configs: layer id -> ``TopKConfig``.
    """
    found: dict[str, str] = {}
    if device_type != "cpu":
        found = _without_kernels(device_type, asked)
    closed = [layer for layer, config in configs.items() if not exposes_scores(config)]
    if closed:
        reason = f"the router of MoE layer(s) {ranges(closed)} exposes no scores"
        found |= dict.fromkeys(("piggyback", "budget"), reason)
    return found


def _without_kernels(device_type: str, asked: str) -> dict[str, str]:
    if device_type != "cuda":
        return dict.fromkeys(OTHERS, f"it has no {device_type} kernel")
    if asked == SIMILARITY:
        return {
            rule: f"the CUDA graphs of this server, which was started under {SIMILARITY}, do not "
            f"have it; start the server with --sere-rule {rule}"
            for rule in OTHERS
        }
    reason = why_unavailable(device_type)
    return {} if reason is None else dict.fromkeys(OTHERS, reason)


def layer_rules(
    layer: Any,
    topk_config: Any,
    profile: SereProfile,
    device: torch.device,
    loss_share: float = 1.0,
) -> LayerRules:
    """Of a ``FusedMoE`` and its router. Warns where surrogates cannot be added.

    loss_share: of loss budgets (`profile.loss_shares`).
    """
    tables = profile.tables.get(layer.layer_id, {})
    surrogates, share = _surrogates(tables, device), output_share(layer)
    weights, cost = energy_weights(tables), expert_loss(tables)
    factor = output_factor(layer, topk_config)
    if surrogates is not None and factor is None:
        logger.warning(
            "MoE layer %d gets no surrogates: with --moe-a2a-backend, or on an AMD GPU, it is not "
            "known where the model's routed_scaling_factor is applied",
            layer.layer_id,
        )
        surrogates = None
    return LayerRules(
        layer_id=layer.layer_id,
        words=RuleWords(
            num_experts=profile.similarity[layer.layer_id].shape[0],
            loss_unit=_mass(tables.get("weight_by_rank"), topk_config) ** 2 * loss_share,
            has_scores=exposes_scores(topk_config),
            has_surrogates=surrogates is not None,
            weights=weights,
        ),
        surrogates=surrogates,
        share=share * (factor or 1.0) * weights.compensation,
        expert_loss=None if cost is None or surrogates is None else cost.to(device),
    )


def _surrogates(tables: Mapping[str, torch.Tensor], device: torch.device) -> Surrogates | None:
    if "surrogate_bias" not in tables:
        return None
    bias = tables["surrogate_bias"]
    none = bias.new_zeros(bias.shape[0], 0, bias.shape[1])
    inward, outward = (tables.get(f"surrogate_{way}", none) for way in ("in", "out"))
    return Surrogates.build(inward, outward, bias, device=device)


def _mass(weights: torch.Tensor | None, topk_config: Any) -> float:
    """What a row's routing weights add up to.

    The profile says it of the engine that calibrated. Where routers here multiply the model's
    ``routed_scaling_factor`` in, they may not have done so there.
    """
    # A profile without weights is read as one of weights that add up to 1.
    mass = 1.0 if weights is None else float(weights.sum())
    if not scales_weights(topk_config) or topk_config.routed_scaling_factor is None:
        return mass
    factor = float(topk_config.routed_scaling_factor)
    if topk_config.renormalize:
        return factor
    # Of a softmax, what a row's best have is at most 1 before the factor.
    return mass * factor if topk_config.scoring_func == "softmax" and mass <= 1.0 else mass


def ranges(ids: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
