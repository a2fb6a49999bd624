"""What a forward runs at. The ground of this folder: imports nothing of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sere_sglang.names import SIMILARITY

_VALUES = {
    SIMILARITY: ("primary_k", "threshold"),
    "piggyback": ("primary_k",),
    "topk": ("primary_k",),
    "budget": ("experts",),
    "energy": ("loss",),
}
"""Rule -> the fields of a point that say how hard it skips."""


@dataclass(frozen=True)
class OperatingPoint:
    """What one forward runs at: a rule and how hard it skips, or nothing at all.

    primary_k, threshold: S and rho of ``similarity``; S is also k0 of ``piggyback`` and ``topk``.
    experts: B of ``budget``.
    loss: of ``energy``, the squared routing weight that may be dropped, as a share of the square
        of all routing weight of a row.
    layers: (layer id, point) where layers have points of their own; the point of the others, and
        the one to name, is this one.
    """

    enabled: bool
    primary_k: int = 0
    threshold: float = 0.0
    layers: tuple[tuple[int, OperatingPoint], ...] = field(default=(), repr=False, hash=False)
    rule: str = SIMILARITY
    experts: int = 0
    loss: float = 0.0

    @functools.cached_property
    def by_layer(self) -> dict[int, OperatingPoint]:
        return dict(self.layers)

    def at(self, layer: int) -> OperatingPoint:
        return self.by_layer.get(layer, self)

    @functools.cached_property
    def mean_primary_k(self) -> float:
        """S, averaged over the layers that are re-routed; 0 when none is or the rule has no S."""
        by_layer = [p.primary_k for _, p in self.layers if p.enabled]
        if by_layer:
            return sum(by_layer) / len(by_layer)
        return float(self.primary_k) if self.enabled else 0.0

    @functools.cached_property
    def mean_loss(self) -> float:
        """What ``energy`` may drop, averaged over all layers."""
        by_layer = [p.loss for _, p in self.layers]
        return sum(by_layer) / len(by_layer) if by_layer else self.loss

    def describe(self) -> dict[str, Any]:
        """As JSON, for ``/server_info``, traces and benchmarks; `described` is the inverse."""
        layers = {str(i): p._values() if p.enabled else None for i, p in self.layers}
        values = {name: getattr(self, name) for name in ("primary_k", "threshold")} | self._values()
        return {
            "name": str(self),
            "enabled": self.enabled,
            "rule": self.rule,
            **values,
            "layers": layers,
        }

    def _values(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in _VALUES[self.rule]}

    def __str__(self) -> str:
        """``exact``, ``S=2 rho=0.25``, ``energy loss<=0.02`` or, where layers differ, ``S=1-3``."""
        if not self.enabled:
            return "exact"
        points = [p for _, p in self.layers if p.enabled] or [self]
        if self.rule == "energy":
            return f"energy loss<={self.mean_loss:.3g}"
        if self.rule == "budget":
            return f"budget B={_span([p.experts for p in points])}"
        s = _span([p.primary_k for p in points])
        if self.rule != SIMILARITY:
            return f"{self.rule} k0={s}"
        return f"S={s}" if self.layers else f"S={s} rho={self.threshold:g}"


OFF = OperatingPoint(enabled=False)


def described(shown: Mapping[str, Any]) -> OperatingPoint:
    """The point that `OperatingPoint.describe` shows. Raises `KeyError`, `TypeError` for others."""
    if not shown["enabled"]:
        return OFF
    rule = shown["rule"]
    return OperatingPoint(
        True,
        rule=rule,
        layers=tuple(
            (int(layer), OFF if values is None else OperatingPoint(True, rule=rule, **values))
            for layer, values in shown["layers"].items()
        ),
        **{name: shown[name] for name in _VALUES[rule]},
    )


def _span(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"
