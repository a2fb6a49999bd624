"""What a decode step costs: a model from the hardware, corrected by what steps really took."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_FORGET = 0.97
_PRIOR_SAMPLES = 4.0


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

    Least squares with the hardware's own prediction (scale 1, nothing per row) as a prior of a
    few samples' weight, so that steps which all look alike leave the scale where it was.
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
        # A prior on scale and row_ms, in units of this model's own times; none on fixed_ms.
        prior = np.diag([1e-9, _PRIOR_SAMPLES * rows**2 * 1e-2, _PRIOR_SAMPLES * moe_ms**2 * 1e-2])
        pull = prior @ np.array([0.0, 0.0, 1.0])
        fixed, per_row, scale = np.linalg.solve(
            self._gram + prior + 1e-12 * np.eye(3), self._target + pull
        )
        self.model = StepModel(max(0.0, fixed), max(0.0, per_row), float(np.clip(scale, 0.05, 20)))
        return self.model
