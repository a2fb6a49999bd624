"""Reading the device counters while the model runs, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sere_sglang.ops import COUNTER_FIELDS
from sere_sglang.ops.rules_call import FRACTION_BITS

FIELDS = (*COUNTER_FIELDS, "loss")
"""A layer's counters in this package: those of its kernels, then what rules beside ``similarity``
dropped, the squared routing weight per valid row in units of 2^-32 (`RuleStage`)."""

LOSS_UNIT = 1.0 / (1 << FRACTION_BITS)
_FORWARDS, _ROWS, _BEFORE, _AFTER, _REROUTED, _CRITICAL, _LOSS = range(len(FIELDS))


@dataclass(frozen=True)
class Window:
    """Means per re-routed forward since the previous reading; arrays are float64 ``[layers]``."""

    forwards: int
    rows: float
    active_before: np.ndarray
    active_after: np.ndarray
    rerouted: np.ndarray
    critical: np.ndarray
    loss: np.ndarray  # that was dropped, of the square of a row's routing weight


class CounterReader:
    """Copies int64 ``[layers, 7]`` counters to the host every `interval` forwards.

    On a GPU the copy is queued on the current (forward) stream and collected by a later `poll`
    once it is done; nothing waits. A window without a re-routed forward is not reported.
    """

    def __init__(
        self, counters: torch.Tensor, loss_unit: Sequence[float], interval: int = 16
    ) -> None:
        """loss_unit: of each layer (`RuleStage`)."""
        self._counters = counters
        self._loss_unit = LOSS_UNIT / np.array(loss_unit)
        self._interval = interval
        self._since = 0
        self._asynchronous = counters.is_cuda
        self._host = torch.zeros_like(counters, device="cpu", pin_memory=self._asynchronous)
        self._done = torch.cuda.Event() if self._asynchronous else None
        self._pending = False
        self._previous = np.zeros(tuple(counters.shape), dtype=np.int64)

    def poll(self) -> Window | None:
        """Call once per forward, after it was queued."""
        window = self._collect()
        self._since += 1
        if self._since >= self._interval and not self._pending:
            self._since = 0
            self._host.copy_(self._counters, non_blocking=True)
            if self._done is not None:
                self._done.record()
            self._pending = True
            if not self._asynchronous:
                return self._collect()
        return window

    def forget(self) -> None:
        """After the counters were zeroed."""
        self._previous[:] = 0
        self._pending = False

    def _collect(self) -> Window | None:
        if not self._pending or (self._done is not None and not self._done.query()):
            return None
        self._pending = False
        now = self._host.numpy().copy()
        step = now - self._previous
        self._previous = now
        forwards = int(step[:, _FORWARDS].max(initial=0))
        if forwards <= 0 or int(step.min(initial=0)) < 0:
            return None
        mean = step / forwards
        return Window(
            forwards=forwards,
            rows=float(mean[:, _ROWS].max()),
            active_before=mean[:, _BEFORE],
            active_after=mean[:, _AFTER],
            rerouted=mean[:, _REROUTED],
            critical=mean[:, _CRITICAL],
            loss=mean[:, _LOSS] * self._loss_unit,
        )
