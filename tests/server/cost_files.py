"""Cost files for servers whose decisions must not depend on how fast this machine is."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sere_sglang.profile import MoeModelInfo
from sere_sglang.schedule.cost import MoeCost, StepModel
from sere_sglang.schedule.cost_file import CostModel, save_cost
from sere_sglang.schedule.layer_cost import LayerShape, MeasuredCost

ROWS = (1, 256)


def write_cost(
    model: Path,
    path: Path,
    *,
    expert_ms: float = 0.1,
    row_ms: float = 0.0,
    step: StepModel | None = None,
) -> Path:
    """A layer of the model folder takes `expert_ms` for each active expert and `row_ms` for each
    row. With `step`, measured steps do not correct it: `StepModel()` is nothing but the layers."""
    info = MoeModelInfo.from_folder(model)
    active = (1, info.num_experts)
    ms = np.add.outer(np.array(ROWS) * row_ms, np.array(active) * expert_ms)
    shape = LayerShape(info.num_experts, info.top_k, info.hidden_size, 0)
    layer = MeasuredCost.fit(shape, ROWS, active, ms)
    save_cost(path, CostModel.of(info), MoeCost(((layer, info.layer_ids),), step=step))
    return path
