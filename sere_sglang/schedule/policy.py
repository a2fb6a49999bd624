"""Policies: batch composition -> operating point, from nothing but what every rank sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sere_sglang.profile.tuning import UNTUNED, Tuning
from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost import MoeCost
from sere_sglang.schedule.expectation import Expectation
from sere_sglang.schedule.feedback import Feedback
from sere_sglang.schedule.point import OFF, SIMILARITY, OperatingPoint
from sere_sglang.schedule.settings import Settings

__all__ = [
    "OFF",
    "Controlled",
    "Controller",
    "OperatingPoint",
    "Policy",
    "PolicyContext",
    "PolicyFactory",
    "StaticPolicy",
    "choose",
    "eligible",
]


class Policy(Protocol):
    """Asked before every forward that `eligible` lets through. Must be a pure function: ranks
    that are asked the same must answer the same. Clocks reach it as `feedback` only."""

    def decide(
        self, composition: BatchComposition, settings: Settings, feedback: Feedback
    ) -> OperatingPoint: ...


class Controller(Protocol):
    """Closes a loop for a policy, on the rank that measures; all ranks get the budget as feedback.

    budget: the one in force.
    """

    budget: float

    def update(
        self, step_ms: float, composition: BatchComposition, settings: Settings, feedback: Feedback
    ) -> float:
        """After a window of steps that took `step_ms` each at `composition`. The new budget."""
        ...


@runtime_checkable
class Controlled(Protocol):
    """A policy that brings a controller of its own."""

    def controller(self) -> Controller: ...


@dataclass(frozen=True)
class PolicyContext:
    """What a policy may build on: the profile's expectation, the cost of this model, and what the
    profile was tuned to."""

    expectation: Expectation
    cost: MoeCost
    tuning: Tuning = UNTUNED


PolicyFactory = Callable[[PolicyContext], Policy]


class StaticPolicy:
    """What the settings say on every eligible batch: S and rho, as published, or another rule's
    S, experts or loss budget."""

    def decide(
        self, composition: BatchComposition, settings: Settings, feedback: Feedback
    ) -> OperatingPoint:
        rule = settings.rule
        if rule == "energy":
            return OperatingPoint(True, rule=rule, loss=settings.quality_budget)
        if rule == "budget":
            return OperatingPoint(True, rule=rule, experts=settings.max_experts or 1)
        rho = settings.threshold if rule == SIMILARITY else 0.0
        return OperatingPoint(True, settings.primary_k, rho, rule=rule)


def eligible(composition: BatchComposition, settings: Settings) -> bool:
    """Decode-like batches of the configured sizes with a row that may change; else all is exact."""
    rows = composition.num_tokens
    return (
        settings.enabled
        and composition.is_decode_like
        and composition.exact_rows < rows
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
