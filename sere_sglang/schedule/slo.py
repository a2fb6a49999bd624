"""``slo``: a closed loop around ``adaptive`` that skips just enough to hold a target."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sere_sglang.schedule.adaptive import AdaptivePolicy
from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.feedback import Feedback
from sere_sglang.schedule.point import OperatingPoint
from sere_sglang.schedule.settings import Settings

_TOO_SLOW = 1.02  # of the target: above it the budget grows
_SLACK = 0.97  # of the target: a smaller budget must be predicted to stay below it
_PATIENCE = (4, 64)  # windows between a violation and the next smaller budget, at least and most
_SMALLER = 0.75  # of the rows: what a batch could not hold says nothing of one this much smaller


class SloPolicy(AdaptivePolicy):
    """``adaptive`` with the budget that `SloController` sent to all ranks; exact before that."""

    def decide(
        self, composition: BatchComposition, settings: Settings, feedback: Feedback
    ) -> OperatingPoint:
        budget = min(feedback.budget or 0.0, settings.quality_budget)
        allowed = dataclasses.replace(settings, quality_budget=budget)
        return super().decide(composition, allowed, feedback)

    def controller(self) -> SloController:
        """As `schedule.policy.Controlled` has it."""
        return SloController(self)


@dataclass
class SloController:
    """Moves the budget between 0 and ``quality_budget`` along `AdaptivePolicy.rungs`, to the
    lowest that is predicted to hold the target. On the rank that measures; the others only learn
    the budget.

    It climbs at once and falls only after a calm time, so that a target between two rungs does
    not make it swing: each fall that turns out wrong doubles the wait for the next one, a held
    target or a much smaller batch shortens it again.
    """

    policy: AdaptivePolicy
    budget: float = 0.0
    _patience: int = _PATIENCE[0]
    _calm: int = 0
    _fell: bool = False
    _rows: int = 0  # of the batch that last missed the target

    def update(
        self,
        step_ms: float,
        composition: BatchComposition,
        settings: Settings,
        feedback: Feedback,
    ) -> float:
        """After a window of steps that took `step_ms` each at `composition`. The new budget."""
        target = settings.tpot_slo_ms
        if target is None:
            return self.budget
        ceiling = settings.quality_budget
        rungs = [r for r in self.policy.rungs(composition, settings, feedback) if r[0] <= ceiling]
        here = before = max(i for i, (budget, _) in enumerate(rungs) if budget <= self.budget)
        # What each rung would take, by the model's ratios and the step that was measured.
        predicted = [step_ms * rung_ms / rungs[here][1] for _, rung_ms in rungs]
        if step_ms > _TOO_SLOW * target:
            if self._fell:
                self._patience = min(2 * self._patience, _PATIENCE[1])
            self._calm, self._fell, self._rows = 0, False, composition.num_tokens
            holding = [i for i in range(here + 1, len(rungs)) if predicted[i] <= target]
            here = holding[0] if holding else len(rungs) - 1
        else:
            self._calm += 1
            if composition.num_tokens < _SMALLER * self._rows:
                self._patience = _PATIENCE[0]
            if self._fell and self._calm >= _PATIENCE[0]:
                self._fell = False
                self._patience = max(self._patience // 2, _PATIENCE[0])
            lowest = next((i for i in range(here) if predicted[i] <= _SLACK * target), here)
            if lowest < here and self._calm >= self._patience:
                here, self._calm, self._fell = lowest, 0, True
        # What measured steps teach moves rungs. A budget that followed its rung down would stand
        # below it when it moves back up: a fall that nobody decided.
        self.budget = min(self.budget, ceiling) if here == before else rungs[here][0]
        return self.budget
