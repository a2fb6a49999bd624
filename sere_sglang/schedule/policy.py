"""Policies: batch composition -> operating point, from nothing but what every rank sees."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Protocol

from sere_sglang.schedule.composition import BatchComposition

if TYPE_CHECKING:
    from sere_sglang.schedule.cost import MoeCost
    from sere_sglang.schedule.expectation import Expectation
    from sere_sglang.schedule.feedback import Feedback
    from sere_sglang.schedule.settings import Settings

ENTRY_POINTS = "sere_sglang.policies"
"""Entry-point group of third parties' policies: name -> a `PolicyFactory`."""


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


class Policy(Protocol):
    """Asked before every forward that `eligible` lets through. Must be a pure function: ranks
    that are asked the same must answer the same. Clocks reach it as `feedback` only."""

    def decide(
        self, composition: BatchComposition, settings: Settings, feedback: Feedback
    ) -> OperatingPoint: ...


@dataclass(frozen=True)
class PolicyContext:
    """What a policy may build on: the profile's expectation and the cost of this model."""

    expectation: Expectation
    cost: MoeCost


PolicyFactory = Callable[[PolicyContext], Policy]


class StaticPolicy:
    """The published method: S and rho from the settings on every eligible batch."""

    def decide(
        self, composition: BatchComposition, settings: Settings, feedback: Feedback
    ) -> OperatingPoint:
        return OperatingPoint(True, settings.primary_k, settings.threshold)


def eligible(composition: BatchComposition, settings: Settings) -> bool:
    """Decode-like batches of the configured sizes; everything else runs exact."""
    rows = composition.num_tokens
    return (
        settings.enabled
        and composition.is_decode_like
        and settings.min_batch <= rows
        and (settings.max_batch is None or rows <= settings.max_batch)
    )


def choose(
    policy: Policy, composition: BatchComposition, settings: Settings, feedback: Feedback
) -> OperatingPoint:
    """The operating point of a forward."""
    if not eligible(composition, settings):
        return OFF
    return policy.decide(composition, settings, feedback)


@functools.cache
def policy_names() -> tuple[str, ...]:
    """Ours first, then third parties' in alphabetical order: the same in every process."""
    others = {entry.name for entry in metadata.entry_points(group=ENTRY_POINTS)}
    return (*_FACTORIES, *sorted(others - set(_FACTORIES)))


def make_policy(name: str, context: PolicyContext) -> Policy:
    """Build a policy by name. Raises `KeyError` for one that `policy_names` does not list."""
    if name in _FACTORIES:
        return _FACTORIES[name](context)
    (entry,) = metadata.entry_points(group=ENTRY_POINTS, name=name)
    factory: PolicyFactory = entry.load()
    return factory(context)


def _static(_context: PolicyContext) -> Policy:
    return StaticPolicy()


def _adaptive(context: PolicyContext) -> Policy:
    from sere_sglang.schedule.adaptive import AdaptivePolicy

    return AdaptivePolicy(context.expectation, context.cost)


def _slo(context: PolicyContext) -> Policy:
    from sere_sglang.schedule.slo import SloPolicy

    return SloPolicy(context.expectation, context.cost)


_FACTORIES: Mapping[str, PolicyFactory] = {
    "static": _static,
    "adaptive": _adaptive,
    "slo": _slo,
}
