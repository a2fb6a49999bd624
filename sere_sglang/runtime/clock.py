"""How long a decode step takes, as the scheduler sees it."""

from __future__ import annotations

import time
from collections.abc import Callable

_SMOOTHING = 0.1


class StepClock:
    """Time from one decode step's launch to the next one's.

    That is the time per output token of a running request. Under the overlap scheduler the host
    runs ahead by one step and is then paced by the device, so launches are as far apart as steps.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last: float | None = None
        self.step_ms: float | None = None
        """Exponential mean; None before the first pair of steps."""

    def tick(self, *, is_decode_like: bool, after_idle: bool) -> float | None:
        """At every launch. Milliseconds since the previous one if both were decode steps."""
        now = self._now()
        last, self._last = self._last, now if is_decode_like else None
        if last is None or after_idle or not is_decode_like:
            return None
        elapsed = 1000 * (now - last)
        previous = elapsed if self.step_ms is None else self.step_ms
        self.step_ms = previous + _SMOOTHING * (elapsed - previous)
        return elapsed
