"""What a forward runs at. The ground of this folder: imports nothing of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OperatingPoint:
    """What one forward runs at: S (`primary_k`) and rho (`threshold`), or nothing at all.

    layers: (layer id, point) where layers have points of their own; the point of the others, and
    the one to name, is S and rho.
    """

    enabled: bool
    primary_k: int = 0
    threshold: float = 0.0
    layers: tuple[tuple[int, OperatingPoint], ...] = field(default=(), repr=False, hash=False)

    @functools.cached_property
    def by_layer(self) -> dict[int, OperatingPoint]:
        return dict(self.layers)

    def at(self, layer: int) -> OperatingPoint:
        return self.by_layer.get(layer, self)

    @functools.cached_property
    def mean_primary_k(self) -> float:
        """S, averaged over the layers that are re-routed; 0 when none is."""
        own = [p.primary_k for _, p in self.layers if p.enabled]
        if own:
            return sum(own) / len(own)
        return float(self.primary_k) if self.enabled else 0.0

    def describe(self) -> dict[str, object]:
        """For ``/server_info``: name, S and rho, and of layers that have their own, those."""
        own = {"enabled": self.enabled, "primary_k": self.primary_k, "threshold": self.threshold}
        layers = {str(i): [p.primary_k, p.threshold] if p.enabled else None for i, p in self.layers}
        return {"name": str(self), **own, "layers": layers}

    def __str__(self) -> str:
        """``exact``, ``S=2 rho=0.25`` or, where layers differ, ``S=1-3``."""
        if not self.enabled:
            return "exact"
        own = [p.primary_k for _, p in self.layers if p.enabled]
        if not own:
            return f"S={self.primary_k} rho={self.threshold:g}"
        return f"S={min(own)}" if min(own) == max(own) else f"S={min(own)}-{max(own)}"


OFF = OperatingPoint(enabled=False)
