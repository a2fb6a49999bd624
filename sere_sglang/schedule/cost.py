"""What a decode step costs: a model from the hardware, corrected by what steps really took."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_FORGET = 0.97
_PRIOR_SAMPLES = 0.3
_SCALES = (0.7, 4.0)


@dataclass(frozen=True)
class MoeCost:
    """A layer loads its active experts or multiplies its rows, whichever takes longer.

    expert_ms: to read one expert's weights; slot_ms: to multiply one routed slot; both of one
    layer on this rank.
    """

    expert_ms: float
    slot_ms: float
    num_layers: int
    top_k: int

    def moe_ms(self, rows: float, active: float | np.ndarray) -> np.ndarray:
        """`active`: experts summed over the layers. Milliseconds of all MoE layers together."""
        compute = self.num_layers * rows * self.top_k * self.slot_ms
        return np.maximum(np.asarray(active) * self.expert_ms, compute)


@dataclass(frozen=True)
class StepModel:
    """step = fixed_ms + row_ms * rows + scale * (MoE time of `MoeCost`)."""

    fixed_ms: float = 0.0
    row_ms: float = 0.0
    scale: float = 1.0

    def step_ms(self, rows: float, moe_ms: float | np.ndarray) -> np.ndarray:
        return self.fixed_ms + self.row_ms * rows + self.scale * np.asarray(moe_ms)


class StepFit:
    """Fits a `StepModel` to measured steps, forgetting old ones.

    Rows and active experts grow together, so steps alone tell their shares poorly. The hardware's
    prediction (scale 1, nothing per row) therefore counts as a prior, and the scale stays within
    what a kernel can differ from the measured bandwidth.
    """

    def __init__(self) -> None:
        self._gram = np.zeros((3, 3))
        self._target = np.zeros(3)
        self.model = StepModel()

    def observe(self, rows: float, moe_ms: float, step_ms: float) -> StepModel:
        """One window of steps: mean rows, `MoeCost.moe_ms` of what was active, median time."""
        features = np.array([1.0, rows, moe_ms])
        self._gram = _FORGET * self._gram + np.outer(features, features)
        self._target = _FORGET * self._target + features * step_ms
        # In units of this batch's own times; no prior on what is fixed.
        prior = np.diag([1e-9, _PRIOR_SAMPLES * rows**2, _PRIOR_SAMPLES * moe_ms**2])
        gram = self._gram + prior
        target = self._target + prior @ np.array([0.0, 0.0, 1.0])
        scale = float(np.clip(np.linalg.solve(gram, target)[2], *_SCALES))
        fixed, per_row = np.linalg.solve(gram[:2, :2], target[:2] - scale * gram[:2, 2])
        if fixed < 0.0:
            fixed, per_row = 0.0, (target[1] - scale * gram[1, 2]) / gram[1, 1]
        elif per_row < 0.0:
            fixed, per_row = (target[0] - scale * gram[0, 2]) / gram[0, 0], 0.0
        self.model = StepModel(max(0.0, float(fixed)), max(0.0, float(per_row)), scale)
        return self.model
