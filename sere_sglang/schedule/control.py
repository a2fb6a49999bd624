"""The device-side control block: how an operating point reaches a running CUDA graph."""

from __future__ import annotations

import torch

from sere_sglang.ops import CONTROL_WORDS, encode_control
from sere_sglang.schedule.policy import OFF, OperatingPoint

# More forwards than the overlap scheduler can ever have in flight.
_RING = 16


class ControlBlock:
    """Sixteen int32 words on `device`, written before a forward, read by every layer's kernel.

    On a GPU each write goes from its own pinned slot, on the current (forward) stream, without
    synchronizing: stream order keeps the words stable for a graph that is still running, the
    ring keeps a slot stable until its copy has been issued and done.
    """

    def __init__(self, device: torch.device) -> None:
        self.words = torch.zeros(CONTROL_WORDS, dtype=torch.int32, device=device)
        self._last: tuple[OperatingPoint, int] | None = None
        self._pinned = device.type == "cuda"
        if self._pinned:
            self._slots = torch.zeros(_RING, CONTROL_WORDS, dtype=torch.int32).pin_memory()
            self._copied = [torch.cuda.Event() for _ in range(_RING)]
            self._next = 0

    def write(self, point: OperatingPoint, num_valid: int) -> None:
        """Set the operating point and the number of real rows of the coming forward."""
        key = (OFF, 0) if not point.enabled else (point, num_valid)
        if key == self._last:
            return
        self._last = key
        words = encode_control(
            enabled=point.enabled,
            num_valid=num_valid,
            classes=[(point.primary_k, point.threshold)],
        )
        if not self._pinned:
            self.words.copy_(words)
            return
        slot, copied = self._slots[self._next], self._copied[self._next]
        self._next = (self._next + 1) % _RING
        copied.synchronize()  # returns at once unless _RING forwards are still queued
        slot.copy_(words)
        self.words.copy_(slot, non_blocking=True)
        copied.record()
