"""``adaptive``: the largest predicted gain whose expected loss fits the quality budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost import MoeCost, StepModel
from sere_sglang.schedule.expectation import MAX_ROWS, Expectation
from sere_sglang.schedule.feedback import Feedback
from sere_sglang.schedule.policy import OFF, OperatingPoint
from sere_sglang.schedule.settings import Settings

_MAX_CACHED = 4096
_WORTH = 0.02  # of what re-routing can gain at most: smaller differences do not count


@dataclass(frozen=True)
class Prediction:
    """For one batch: expected loss and step time of each point of the `Expectation`."""

    loss: np.ndarray
    step_ms: np.ndarray
    plain_ms: float


class AdaptivePolicy:
    """Pure: the same composition, settings and feedback give the same point on every rank."""

    def __init__(self, expectation: Expectation, cost: MoeCost) -> None:
        self.expectation = expectation
        self.cost = cost
        self._points = tuple(OperatingPoint(True, s, rho) for s, rho in expectation.points)
        self._cache: dict[tuple[object, ...], OperatingPoint] = {}

    def decide(
        self, composition: BatchComposition, settings: Settings, feedback: Feedback
    ) -> OperatingPoint:
        budget = settings.quality_budget
        key = (
            composition.num_tokens,
            composition.exact_rows,
            budget,
            settings.min_gain,
            feedback.step,
        )
        known = self._cache.get(key)
        if known is None:
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            known = self._cache[key] = self._decide(composition, settings, feedback, budget)
        return known

    def predict(self, composition: BatchComposition, model: StepModel) -> Prediction:
        """What each operating point would do to this batch.

        Exact rows keep their experts active and cost no quality, so they thin out both.
        """
        rows = composition.num_tokens
        row = min(rows, MAX_ROWS)
        free = 1.0 - composition.exact_rows / max(rows, 1)
        plain = self.expectation.plain[row]
        active = plain - free * np.maximum(plain - self.expectation.active[row], 0.0)
        return Prediction(
            loss=free * self.expectation.loss[row],
            step_ms=model.step_ms(rows, self.cost.moe_ms(rows, active)),
            plain_ms=float(model.step_ms(rows, self.cost.moe_ms(rows, plain))),
        )

    def rungs(
        self, composition: BatchComposition, settings: Settings, feedback: Feedback
    ) -> list[tuple[float, float]]:
        """Every (budget, step_ms) at which a larger budget makes this batch faster, ascending;
        the first one is exact routing."""
        seen = self.predict(composition, feedback.step)
        rungs = [(0.0, seen.plain_ms)]
        slowest_useful = seen.plain_ms / (1.0 + settings.min_gain)
        worth = _WORTH * (seen.plain_ms - float(seen.step_ms.min()))
        for i in np.lexsort((seen.step_ms, seen.loss)):
            if seen.step_ms[i] <= slowest_useful and seen.step_ms[i] < rungs[-1][1] - worth:
                rungs.append((float(seen.loss[i]), float(seen.step_ms[i])))
        return rungs

    def _decide(
        self,
        composition: BatchComposition,
        settings: Settings,
        feedback: Feedback,
        budget: float,
    ) -> OperatingPoint:
        seen = self.predict(composition, feedback.step)
        step_ms = np.where(seen.loss <= budget, seen.step_ms, np.inf)
        fastest = float(step_ms.min())
        if not fastest * (1.0 + settings.min_gain) <= seen.plain_ms:
            return OFF
        # Of points that are about as fast, the one that loses least.
        near = np.flatnonzero(step_ms <= fastest + _WORTH * (seen.plain_ms - fastest))
        return self._points[near[np.argmin(seen.loss[near])]]
