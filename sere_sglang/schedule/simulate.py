"""Policies against a trace or synthetic traffic, with the cost model in place of a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sere_sglang.profile.tuning import UNTUNED, Tuning
from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost import MoeCost, StepModel
from sere_sglang.schedule.expectation import Expectation
from sere_sglang.schedule.feedback import first_feedback
from sere_sglang.schedule.observer import Observer
from sere_sglang.schedule.point import OperatingPoint
from sere_sglang.schedule.policy import PolicyContext, choose
from sere_sglang.schedule.registry import make_policy
from sere_sglang.schedule.settings import Settings


@dataclass(frozen=True)
class Traffic:
    """Requests arrive at random (Poisson) and decode a random number of tokens (geometric).

    rate: requests per second; it swings between `rate` and `peak` with `period_s`.
    """

    rate: float
    peak: float
    period_s: float
    tokens: float
    max_running: int
    prefill_ms: float
    seed: int = 0


@dataclass
class Run:
    """What a policy made of the traffic; one entry per decode step."""

    name: str
    time_s: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    active: list[float] = field(default_factory=list)
    rerouted: list[bool] = field(default_factory=list)
    primary_k: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Means over decode steps; tok_s over the simulated time; loss weighted by rows."""
        rows, step = np.array(self.rows), np.array(self.step_ms)
        seconds = self.time_s[-1] if self.time_s else 0.0
        return {
            "policy": self.name,
            "steps": len(rows),
            "rows": float(rows.mean()),
            "active": float(np.mean(self.active)),
            "rerouted_steps": float(np.mean(self.rerouted)),
            "tok_s": float(rows.sum() / seconds) if seconds else 0.0,
            "tpot_p50_ms": float(np.percentile(step, 50)),
            "tpot_p99_ms": float(np.percentile(step, 99)),
            "loss": float(np.average(self.loss, weights=rows)),
        }


class Simulator:
    """One policy on one model. Steps take what `step` and `cost` say, times `noise`."""

    def __init__(
        self,
        expectation: Expectation,
        cost: MoeCost,
        step: StepModel,
        *,
        tuning: Tuning = UNTUNED,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.expectation, self.cost, self.step = expectation, cost, step
        self._context = PolicyContext(expectation, cost, tuning)
        self._noise = noise
        self._seed = seed

    def replay(
        self,
        name: str,
        settings: Settings,
        compositions: Iterable[BatchComposition],
        told: Callable[[int], None] = lambda _: None,
    ) -> Run:
        """The forwards of a trace, one after the other, whatever the policy does to their time."""
        return self._run(name, settings, lambda _run: iter(compositions), told)

    def serve(
        self,
        name: str,
        settings: Settings,
        traffic: Traffic,
        steps: int,
        told: Callable[[int], None] = lambda _: None,
    ) -> Run:
        """Closed loop: faster steps serve the same arrivals with smaller batches."""
        return self._run(name, settings, lambda run: _arrivals(traffic, run, steps), told)

    def _run(
        self,
        name: str,
        settings: Settings,
        source: Callable[[Run], Iterator[BatchComposition]],
        told: Callable[[int], None],
    ) -> Run:
        run = Run(name)
        policy = make_policy(settings.policy, self._context)
        observer = Observer(policy, self.cost)
        random = np.random.default_rng(self._seed)
        feedback = first_feedback(self.cost)
        now = 0.0
        for done, composition in enumerate(source(run)):
            if done % 1000 == 0:
                told(done)
            if not composition.is_decode_like or not composition.num_tokens:
                continue
            point = choose(policy, composition, settings, feedback)
            active, loss = self._effect(composition, point)
            rows = composition.num_tokens
            step_ms = float(self.step.step_ms(rows, self.cost.moe_ms(rows, active)))
            step_ms *= 1.0 + self._noise * random.standard_normal()
            now += step_ms / 1000
            run.time_s.append(now)
            run.rows.append(rows)
            run.active.append(active / self.expectation.num_layers)
            run.rerouted.append(point.enabled)
            run.primary_k.append(point.mean_primary_k)
            run.step_ms.append(step_ms)
            run.loss.append(loss)
            observer.note_active(active)
            feedback = observer.note_step(step_ms, composition, active, settings) or feedback
        return run

    def _effect(self, composition: BatchComposition, point: OperatingPoint) -> tuple[float, float]:
        """(active experts, loss); exact rows thin out both."""
        active, loss = self.expectation.effect(composition.num_tokens, point)
        plain = self.expectation.plain_active(composition.num_tokens)
        free = composition.free_share
        return plain - free * (plain - active), composition.loss_factor(point.rule) * loss


def _arrivals(traffic: Traffic, run: Run, steps: int) -> Iterator[BatchComposition]:
    """Continuous batching: whoever has arrived by the end of a step joins the next one."""
    random = np.random.default_rng(traffic.seed)
    left = np.zeros(0, dtype=np.int64)
    waiting, arrived_until, idle = 0, 0.0, 0.0
    for _ in range(steps):
        now = (run.time_s[-1] if run.time_s else 0.0) + idle
        swing = 0.5 - 0.5 * np.cos(2 * np.pi * now / traffic.period_s)
        rate = traffic.rate + (traffic.peak - traffic.rate) * swing
        waiting += int(random.poisson(max(rate * (now - arrived_until), 0.0)))
        arrived_until = now
        if not len(left) and not waiting:
            idle += float(random.exponential(1.0 / rate))
            waiting, arrived_until = 1, now + idle
        joining = min(waiting, traffic.max_running - len(left))
        if joining:
            waiting -= joining
            idle += joining * traffic.prefill_ms / 1000
            left = np.concatenate([left, random.geometric(1.0 / traffic.tokens, joining)])
        yield BatchComposition(
            "decode",
            decode_tokens=len(left),
            padded_rows=len(left),
            running=len(left),
            waiting=waiting,
        )
        left = left[left > 1] - 1
