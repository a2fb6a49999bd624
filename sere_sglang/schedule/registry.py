"""Policies by name: ours, and those that other packages bring."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from sere_sglang.names import POLICY_ENTRY_POINTS
from sere_sglang.schedule.adaptive import AdaptivePolicy
from sere_sglang.schedule.policy import Policy, PolicyContext, PolicyFactory, StaticPolicy
from sere_sglang.schedule.slo import SloPolicy

_FACTORIES: Mapping[str, PolicyFactory] = {
    "static": lambda _context: StaticPolicy(),
    "adaptive": lambda context: AdaptivePolicy(context.expectation, context.cost, context.tuning),
    "slo": lambda context: SloPolicy(context.expectation, context.cost),
}


def make_policy(name: str, context: PolicyContext) -> Policy:
    """Build a policy by name. Raises `KeyError` for one that `policy_names` does not list."""
    if name in _FACTORIES:
        return _FACTORIES[name](context)
    (entry,) = metadata.entry_points(group=POLICY_ENTRY_POINTS, name=name)
    factory: PolicyFactory = entry.load()
    return factory(context)
