"""On the rank that measures: windows of steps -> feedback for the policies of all ranks."""

from __future__ import annotations

import statistics

from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost import MoeCost, StepFit
from sere_sglang.schedule.feedback import Feedback, first_feedback
from sere_sglang.schedule.policy import Controlled
from sere_sglang.schedule.settings import Settings

WINDOW = 8
"""Decode steps between two looks; the rate at which anything measured can change a decision."""


class Observer:
    """Collects decode steps into windows; `feedback` is what it last concluded.

    A cost that has a step model of its own keeps it: nothing is fitted then.
    """

    def __init__(self, policy: object, cost: MoeCost) -> None:
        self._cost = cost
        self._fit = StepFit(cost.source)
        self._controller = policy.controller() if isinstance(policy, Controlled) else None
        self._steps: list[tuple[float, BatchComposition]] = []
        self._active: float | None = None
        self.feedback = first_feedback(cost)

    def note_active(self, experts: float) -> None:
        """Experts executed per forward, summed over the layers, when counters were read."""
        self._active = experts

    def note_step(
        self,
        elapsed_ms: float,
        composition: BatchComposition,
        expected_active: float,
        settings: Settings,
    ) -> Feedback | None:
        """After each pair of decode steps. New feedback at the end of a window.

        Args:
            elapsed_ms: time from the previous decode step to this one.
            composition: of the previous step, which took that long.
            expected_active: experts it was expected to execute, summed over the layers.
        """
        self._steps.append((elapsed_ms, composition))
        if len(self._steps) < WINDOW:
            return None
        steps, self._steps = self._steps, []
        step_ms = statistics.median(elapsed for elapsed, _ in steps)
        rows = statistics.fmean(c.num_tokens for _, c in steps)
        active = expected_active if self._active is None else self._active
        self._active = None
        model = self._cost.step or self._fit.observe(
            rows, float(self._cost.moe_ms(rows, active)), step_ms
        )
        budget = None
        if self._controller is not None:
            seen = Feedback(step=model, step_ms=step_ms, budget=self._controller.budget)
            budget = self._controller.update(step_ms, steps[-1][1], settings, seen)
        self.feedback = Feedback(step=model, step_ms=step_ms, budget=budget)
        return self.feedback
