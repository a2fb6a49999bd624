"""A model, its cost and settings that the policy tests share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from sere_sglang.config import live_settings
from sere_sglang.config_check import resolved
from sere_sglang.options import SereConfig
from sere_sglang.schedule.auto_rule import RuleChoice
from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost import MoeCost
from sere_sglang.schedule.expectation import Expectation, LayerStatistics, expect
from sere_sglang.schedule.settings import Settings

EXPERTS, TOP_K, LAYERS = 64, 8, 4
ENERGY = np.arange(TOP_K, 0, -1) ** 2 / np.sum(np.arange(TOP_K, 0, -1) ** 2)
COST = MoeCost.from_bandwidth(
    expert_ms=0.1, slot_ms=0.001, num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K
)
AUTO = RuleChoice("energy", True, "it is a toy")


@functools.cache
def expectation() -> Expectation:
    """Skewed popularity, similarities that grow from layer to layer."""
    rng = np.random.default_rng(0)
    layers = {}
    for layer in range(LAYERS):
        popularity = rng.dirichlet(np.full(EXPERTS, 2.0))
        similarity = rng.uniform(0.3, 0.9, (EXPERTS, EXPERTS))
        # Layer 0 has the worst substitutes, the last layer the best.
        similarity = np.clip((similarity + similarity.T) / 2 + 0.1 * layer, 0.0, 0.98)
        layers[layer] = LayerStatistics(similarity, np.tile(popularity, (TOP_K, 1)), ENERGY)
    return expect(layers)


def decode(rows: int, **more: Any) -> BatchComposition:
    return BatchComposition("decode", decode_tokens=rows, padded_rows=rows, **more)


def settings(**changes: Any) -> Settings:
    """A server's own under SERE's rule, but for a looser budget, and every batch re-routed."""
    served = live_settings(
        resolved(SereConfig(moe_backend="sere", sere_rule="similarity"), top_k=TOP_K)
    )
    values = {"primary_k": 2, "threshold": 0.25, "min_batch": 1, "quality_budget": 0.05}
    return dataclasses.replace(served, **(values | changes))
