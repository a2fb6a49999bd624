"""A rank's runtime over the demo model's layers, without the model."""

from __future__ import annotations

from pathlib import Path

import torch

from sere_sglang.config_check import checked, resolved
from sere_sglang.ops import COUNTER_FIELDS, LayerTable
from sere_sglang.options import SereConfig
from sere_sglang.profile import load_profile
from sere_sglang.runtime.bind import Binding
from sere_sglang.runtime.control import ControlBlock
from sere_sglang.runtime.counters import FIELDS
from sere_sglang.runtime.rank import SereRuntime
from sere_sglang.runtime.stage import RerouteStage, Switch
from sere_sglang.schedule.auto_rule import choose_rule
from sere_sglang.schedule.cost import MoeCost

PROFILE = Path(__file__).resolve().parents[2] / "demo_model" / "sere_profile.safetensors"
TOP_K = 6


def one_rank(config: SereConfig) -> SereRuntime:
    """It does not serve yet, and all that it runs counts as replays of graphs."""
    asked = resolved(checked(config), top_k=TOP_K)
    profile = load_profile(PROFILE)
    layers = sorted(profile.similarity)
    control = ControlBlock(torch.device("cpu"), layers, 512)
    counters = torch.zeros(len(layers), len(FIELDS), dtype=torch.int64)
    switch = Switch()
    stages = [
        RerouteStage(
            layer,
            TOP_K,
            LayerTable(profile.similarity[layer]),
            control.words[i],
            control.row_class,
            counters[i, : len(COUNTER_FIELDS)],
            switch,
        )
        for i, layer in enumerate(layers)
    ]
    cost = MoeCost.from_bandwidth(
        expert_ms=0.02,
        slot_ms=0.001,
        num_layers=len(layers),
        num_experts=profile.num_experts,
        top_k=TOP_K,
    )
    binding = Binding("none", stages, control, counters, switch, "none", choose_rule(profile))
    made = SereRuntime(asked, binding, profile, cost)
    made._captured |= {"extend", "mixed", "decode", "verify"}
    return made
