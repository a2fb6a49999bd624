"""A simulated server in the closed loop of ``slo``."""

from __future__ import annotations

from collections import deque

import numpy as np

from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost import StepModel
from sere_sglang.schedule.feedback import NO_FEEDBACK, Feedback
from sere_sglang.schedule.observer import Observer
from sere_sglang.schedule.point import OperatingPoint
from sere_sglang.schedule.settings import Settings
from sere_sglang.schedule.slo import SloPolicy
from tests.schedule.toy_model import COST, expectation, settings

POLICY = SloPolicy(expectation(), COST)


def truth(scale: float = 1.4) -> StepModel:
    return StepModel(fixed_ms=6.0, row_ms=0.05, scale=scale)


class Plant:
    """A server whose steps take what `truth` says of the active experts, with noise.

    What rank 0 concludes reaches the policy `delay` steps later, as under overlap scheduling.
    """

    def __init__(
        self,
        now: Settings,
        *,
        noise: float = 0.02,
        delay: int = 2,
        seed: int = 1,
        scale: float = 1.4,
    ) -> None:
        self.now, self.noise, self.truth = now, noise, truth(scale)
        self.rng = np.random.default_rng(seed)
        self.feedback = NO_FEEDBACK
        self.observer = Observer(POLICY, COST)
        self.pipe: deque[Feedback | None] = deque([None] * delay)
        self.points: list[OperatingPoint] = []
        self.budgets: list[float] = []
        self.losses: list[float] = []
        self.times: list[float] = []

    def run(self, rows: int, steps: int) -> None:
        tables = expectation()
        for _ in range(steps):
            composition = BatchComposition("decode", decode_tokens=rows)
            point = POLICY.decide(composition, self.now, self.feedback)
            active, loss = tables.effect(rows, point)
            step_ms = float(self.truth.step_ms(rows, COST.moe_ms(rows, active)))
            step_ms *= self.rng.normal(1.0, self.noise)
            self.points.append(point)
            self.budgets.append(self.feedback.budget or 0.0)
            self.losses.append(loss)
            self.times.append(step_ms)
            self.observer.note_active(active)
            self.pipe.append(self.observer.note_step(step_ms, composition, active, self.now))
            arrived = self.pipe.popleft()
            self.feedback = arrived or self.feedback


def rungs_within(rows: int, budget: float, scale: float = 1.4) -> list[tuple[float, float]]:
    """(loss, step_ms) from exact routing to the strongest skipping within the budget, in truth."""
    composition = BatchComposition("decode", decode_tokens=rows)
    now = settings(policy="slo", quality_budget=budget, tpot_slo_ms=1.0)
    rungs = POLICY.rungs(composition, now, Feedback(step=truth(scale)))
    return [rung for rung in rungs if rung[0] <= budget]
