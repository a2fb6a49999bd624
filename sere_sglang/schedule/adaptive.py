"""``adaptive``: the largest predicted gain whose expected loss fits the quality budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sere_sglang.profile.tuning import UNTUNED, Tuning
from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost import MoeCost, StepModel
from sere_sglang.schedule.expectation import Expectation
from sere_sglang.schedule.feedback import Feedback
from sere_sglang.schedule.ladder import Ladders
from sere_sglang.schedule.point import OFF, OperatingPoint
from sere_sglang.schedule.settings import Settings

_MAX_CACHED = 4096
_WORTH = 0.02  # of what re-routing can gain at most: smaller differences do not count


@dataclass(frozen=True)
class Prediction:
    """For one batch: expected loss and step time of each rung of its `Ladder`; 0 is exact."""

    loss: np.ndarray
    step_ms: np.ndarray


def budget_of(tuning: Tuning, settings: Settings, batch: int) -> float:
    """Loss that a decode batch of `batch` rows may cost: the tuned one, where there is one and it
    is wanted, else that of the settings. ``slo`` moves its own."""
    if settings.tuned and settings.policy == "adaptive":
        tuned = tuning.budget(settings.rule, batch)
        if tuned is not None:
            return tuned
    return settings.quality_budget


class AdaptivePolicy:
    """Pure: the same composition, settings and feedback give the same point on every rank."""

    def __init__(self, expectation: Expectation, cost: MoeCost, tuning: Tuning = UNTUNED) -> None:
        self.expectation = expectation
        self.cost = cost
        self.tuning = tuning
        self._ladders: dict[str, Ladders] = {}
        self._cache: dict[tuple[object, ...], OperatingPoint] = {}

    def decide(
        self, composition: BatchComposition, settings: Settings, feedback: Feedback
    ) -> OperatingPoint:
        budget = budget_of(self.tuning, settings, composition.num_tokens)
        key = (
            composition.num_tokens,
            composition.exact_rows,
            settings.rule,
            budget,
            settings.min_gain,
            feedback.step,
        )
        known = self._cache.get(key)
        if known is None:
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            known = self._cache[key] = self._decide(composition, settings, budget, feedback)
        return known

    def ladders(self, rule: str) -> Ladders:
        """Built when a rule is first asked for."""
        if rule not in self._ladders:
            self._ladders[rule] = Ladders(self.expectation.of(rule))
        return self._ladders[rule]

    def predict(self, composition: BatchComposition, rule: str, model: StepModel) -> Prediction:
        """What each rung would do to this batch.

        Exact rows keep their experts active and cost no quality, so they thin out both.
        """
        rows = composition.num_tokens
        ladder = self.ladders(rule).of(rows)
        free = composition.free_share
        active = ladder.active[0] - free * (ladder.active[0] - ladder.active)
        return Prediction(
            loss=composition.loss_factor(rule) * ladder.loss,
            step_ms=model.step_ms(rows, self.cost.moe_ms(rows, active)),
        )

    def rungs(
        self, composition: BatchComposition, settings: Settings, feedback: Feedback
    ) -> list[tuple[float, float]]:
        """Every (budget, step_ms) at which a larger budget makes this batch noticeably faster,
        ascending; the first one is exact routing."""
        seen = self.predict(composition, settings.rule, feedback.step)
        exact = float(seen.step_ms[0])
        rungs = [(0.0, exact)]
        slowest_useful = exact / (1.0 + settings.min_gain)
        worth = _WORTH * (exact - float(seen.step_ms[-1]))
        for loss, step_ms in zip(seen.loss.tolist(), seen.step_ms.tolist(), strict=True):
            if step_ms <= slowest_useful and step_ms < rungs[-1][1] - worth:
                rungs.append((loss, step_ms))
        return rungs

    def _decide(
        self, composition: BatchComposition, settings: Settings, budget: float, feedback: Feedback
    ) -> OperatingPoint:
        if budget <= 0.0:
            return OFF  # exact, even where a profile calls two experts twins
        seen = self.predict(composition, settings.rule, feedback.step)
        within = int(np.searchsorted(seen.loss, budget, side="right"))
        exact, fastest = float(seen.step_ms[0]), float(seen.step_ms[within - 1])
        if fastest * (1.0 + settings.min_gain) > exact:
            return OFF
        # The first rung that is about as fast loses less.
        enough = fastest + _WORTH * (exact - fastest)
        rung = int(np.argmax(seen.step_ms[:within] <= enough))
        return self.ladders(settings.rule).point(composition.num_tokens, rung)
