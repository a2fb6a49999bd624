"""What a decode step costs: what its MoE layers were timed to take, corrected by what steps really
took."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sere_sglang.schedule.layer_cost import BandwidthCost, LayerCost, LayerShape

Source = Literal["measured", "file", "bandwidth model"]

_FORGET = 0.97
_PRIOR_SAMPLES = 0.3
_SCALES = (0.7, 4.0)
_MAX_KEPT = 1024


@dataclass(frozen=True)
class StepModel:
    """step = fixed_ms + row_ms * rows + scale * (MoE time of `MoeCost`)."""

    fixed_ms: float = 0.0
    row_ms: float = 0.0
    scale: float = 1.0

    def step_ms(self, rows: float, moe_ms: float | np.ndarray) -> np.ndarray:
        return self.fixed_ms + self.row_ms * rows + self.scale * np.asarray(moe_ms)


@dataclass(frozen=True)
class MoeCost:
    """Time of all MoE layers of a forward, from one `LayerCost` for each shape of layer.

    layers: (cost of one layer, ids of the layers that it stands for).
    seconds: what measuring it took. reason: why the layers could not be timed, if so.
    step: given with the table, it is never corrected, and a decision depends on nothing that is
        measured while serving.
    """

    layers: tuple[tuple[LayerCost, tuple[int, ...]], ...]
    source: Source = "bandwidth model"
    seconds: float = 0.0
    hardware: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    step: StepModel | None = None
    _curves: dict[float, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def from_bandwidth(
        cls, *, expert_ms: float, slot_ms: float, num_layers: int, num_experts: int, top_k: int
    ) -> MoeCost:
        """Of layers that load or multiply, see `BandwidthCost`."""
        shape = LayerShape(num_experts, top_k, 0, 0)
        layer = BandwidthCost(shape, expert_ms, slot_ms)
        return cls(((layer, tuple(range(num_layers))),))

    @property
    def num_layers(self) -> int:
        return sum(len(ids) for _, ids in self.layers)

    def covering(self, layer_ids: Iterable[int]) -> MoeCost:
        """Of all these layers: those of other pipeline stages cost what most of this one's do."""
        missing = set(layer_ids) - {i for _, ids in self.layers for i in ids}
        if not missing:
            return self
        most = max(range(len(self.layers)), key=lambda i: len(self.layers[i][1]))
        layers = list(self.layers)
        layer, ids = layers[most]
        layers[most] = (layer, tuple(sorted({*ids, *missing})))
        return dataclasses.replace(self, layers=tuple(layers), _curves={})

    def moe_ms(self, rows: float, active: float | np.ndarray) -> np.ndarray:
        """`active`: experts summed over the layers, which share them alike; more than the rows
        can have counts as what they can. Milliseconds of all MoE layers together."""
        curve = self._curves.get(rows)
        if curve is None:
            if len(self._curves) >= _MAX_KEPT:
                self._curves.clear()
            curve = self._curves[rows] = self._curve(rows)
        return np.interp(np.asarray(active) / self.num_layers, *curve)

    def __str__(self) -> str:
        """For the log: where it comes from, and the largest table's corners."""
        if self.source == "bandwidth model":
            return "cost from a bandwidth model" + (f" ({self.reason})" if self.reason else "")
        where = f"measured in {self.seconds:.1f} s" if self.source == "measured" else "from a file"
        layer = max((layer for layer, _ in self.layers), key=lambda layer: layer.shape.expert_bytes)
        rows = max(getattr(layer, "rows", (1,)))
        x, y = layer.curve(rows)
        few = min(layer.shape.top_k, x[-1])
        return (
            f"cost of a layer {where}: at {rows} rows {np.interp(few, x, y):.3g} ms "
            f"with {few:g} experts, {y[-1]:.3g} ms with {x[-1]:g}"
        )

    def _curve(self, rows: float) -> tuple[np.ndarray, np.ndarray]:
        """All layers together, over the mean of active experts per layer."""
        curves = [(cost.curve(rows), len(ids)) for cost, ids in self.layers]
        x = np.unique(np.concatenate([own for (own, _), _ in curves]))
        return x, np.sum([count * np.interp(x, *curve) for curve, count in curves], axis=0)


class StepFit:
    """Fits a `StepModel` to measured steps, forgetting old ones.

    Rows and active experts grow together, so steps alone tell their shares poorly. What the layers
    were timed to take (scale 1, nothing per row) therefore counts as a prior, and the scale stays
    within what a layer in a step can differ from one that is timed alone.
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
