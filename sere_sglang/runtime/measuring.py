"""What a rank measures of its steps, for policies and people: clock and counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sere_sglang.names import SIMILARITY
from sere_sglang.runtime.clock import StepClock
from sere_sglang.runtime.counters import CounterReader, Window
from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost import MoeCost
from sere_sglang.schedule.expectation import Expectation
from sere_sglang.schedule.feedback import Feedback
from sere_sglang.schedule.observer import Observer
from sere_sglang.schedule.point import OFF, OperatingPoint
from sere_sglang.schedule.policy import Policy
from sere_sglang.schedule.settings import Settings

if TYPE_CHECKING:
    from sere_sglang.runtime.metrics import SereMetrics

_REPORT_EVERY = 16  # decode steps between two looks at an operating point that stays


class Measuring:
    """One per rank.

    window: what the counters said last of the operating point that is in force.
    """

    def __init__(
        self, reader: CounterReader, policy: Policy, cost: MoeCost, expectation: Expectation
    ) -> None:
        self.clock = StepClock()
        self.window: Window | None = None
        self._reader = reader
        self._cost = cost
        self._expectation = expectation
        self._observer = Observer(policy, cost)
        self._outbox: Feedback | None = None
        self._counted, self._forwards = OFF, 0  # the last point that was counted, and how often
        self._reported: OperatingPoint | None = None
        self._steps = 0

    def follow(self, policy: Policy) -> None:
        """From now on for this policy."""
        self._observer = Observer(policy, self._cost)

    def note_step(
        self,
        composition: BatchComposition,
        last: BatchComposition | None,
        point: OperatingPoint,
        settings: Settings,
        metrics: SereMetrics | None,
    ) -> None:
        """The launch of this step ends the previous one, `last`, which ran at `point`."""
        elapsed = self.clock.tick(
            is_decode_like=composition.is_decode_like, after_idle=composition.after_idle
        )
        if elapsed is None or last is None:
            return
        expected, _ = self._expectation.effect(last.num_tokens, point)
        feedback = self._observer.note_step(elapsed, last, expected, settings)
        if feedback is not None:
            self._outbox = feedback
        if metrics is not None and self.clock.step_ms is not None:
            metrics.observe_step(elapsed, self.clock.step_ms)

    def note_point(self, point: OperatingPoint) -> None:
        """Of the forward that is about to run; a window of another point is forgotten."""
        if not point.enabled:
            return
        if point != self._counted:
            self._counted, self._forwards, self.window = point, 0, None
        self._forwards += 1

    def take_feedback(self) -> Feedback | None:
        """What was concluded since the last call."""
        outbox, self._outbox = self._outbox, None
        return outbox

    def read_counters(self) -> Window | None:
        """After a forward; a window that is new."""
        window = self._reader.poll()
        if window is not None:
            # Not what was counted at other points.
            self.window = window if window.forwards <= self._forwards else None
            self._observer.note_active(float(window.active_after.sum()))
        return window

    def spent_loss(self, point: OperatingPoint) -> float | None:
        """What was counted last at `point`, in the mean over layers; None where nothing was."""
        counts = point.enabled and point.rule != SIMILARITY
        return float(self.window.loss.mean()) if counts and self.window is not None else None

    def report(
        self,
        metrics: SereMetrics,
        composition: BatchComposition,
        point: OperatingPoint,
        settings: Settings,
        budget: float,
        predicted_ms: Callable[[], float | None],
    ) -> None:
        """The point in force, when it has changed and now and then."""
        self._steps += 1
        changed = point != self._reported or self._steps % _REPORT_EVERY == 0
        if not (changed and composition.is_decode_like):
            return
        self._reported = point
        metrics.set_point(point, budget, predicted_ms())
        metrics.set_policy(settings)

    def forget(self) -> None:
        """After the counters were zeroed."""
        self._reader.forget()
