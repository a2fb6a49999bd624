"""The device-side control block: how an operating point reaches a running CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from sere_sglang.ops import CONTROL_WORDS, encode_control
from sere_sglang.schedule.point import OFF, OperatingPoint

# More forwards than the overlap scheduler can ever have in flight.
_RING = 16
_LAYER_BYTES = 4 * CONTROL_WORDS
_WORD_NUM_VALID = 1
_MAX_TEMPLATES = 256

ClassTable = tuple[tuple[int, float], ...]
"""(S, rho) of the row classes beyond class 0, which runs at the operating point."""


class ControlBlock:
    """What every layer's kernel reads, in one buffer that is written before a forward.

    words: int32 ``[layers, 16]`` (`ops.control`), one block per layer.
    row_class: uint8 ``[max_rows]``, read only while the blocks name more than one class.

    On a GPU each write goes from its own pinned slot, on the current (forward) stream, without
    synchronizing: stream order keeps the words stable for a graph that is still running, the
    ring keeps a slot stable until its copy is done. Nothing is allocated.
    """

    def __init__(self, device: torch.device, layer_ids: Sequence[int], max_rows: int) -> None:
        self.max_rows = max_rows
        self._layer_ids = tuple(layer_ids)
        self._words_bytes = _LAYER_BYTES * len(self._layer_ids)
        size = self._words_bytes + max_rows
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.words = self._device[: self._words_bytes].view(torch.int32).view(-1, CONTROL_WORDS)
        self.row_class = self._device[self._words_bytes :]
        self._templates: dict[tuple[OperatingPoint, ClassTable], np.ndarray] = {}
        self._last: tuple[object, ...] | None = None
        self._pinned = device.type == "cuda"
        slots = _RING if self._pinned else 1
        self._slots = torch.zeros(slots, size, dtype=torch.uint8, pin_memory=self._pinned)
        self._host = [slot.numpy() for slot in self._slots]
        self._copied = [torch.cuda.Event() for _ in range(slots if self._pinned else 0)]
        self._next = 0

    def write(
        self,
        point: OperatingPoint,
        num_valid: int,
        row_class: bytes = b"",
        classes: ClassTable = (),
    ) -> None:
        """Set what the coming forward runs at.

        Args:
            point: of the rows of class 0.
            num_valid: real rows; those behind are padding. -1: every row is real.
            row_class: class of each real row; empty when all are of class 0.
            classes: (S, rho) of class 1, 2, ... when `row_class` is given.
        """
        if not point.enabled:
            point, num_valid, row_class = OFF, 0, b""
        key = (point, num_valid, row_class, classes if row_class else ())
        if key == self._last:
            return
        self._last = key
        host = self._host[self._next]
        if self._pinned:
            # Returns at once unless _RING forwards are still queued.
            self._copied[self._next].synchronize()
        words = host[: self._words_bytes].view(np.int32).reshape(-1, CONTROL_WORDS)
        words[:] = self._template(point, classes if row_class else ())
        words[:, _WORD_NUM_VALID] = num_valid
        size = self._words_bytes + len(row_class)
        host[self._words_bytes : size] = np.frombuffer(row_class, dtype=np.uint8)
        self._device[:size].copy_(self._slots[self._next, :size], non_blocking=True)
        if self._pinned:
            self._copied[self._next].record()
            self._next = (self._next + 1) % _RING

    def _template(self, point: OperatingPoint, classes: ClassTable) -> np.ndarray:
        """The blocks of all layers, int32 ``[layers, 16]``, with any number of rows."""
        known = self._templates.get((point, classes))
        if known is None:
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            rows = [_encode(point.at(layer), classes) for layer in self._layer_ids]
            known = self._templates[point, classes] = np.stack(rows)
        return known


@functools.lru_cache(maxsize=_MAX_TEMPLATES)
def _encode(point: OperatingPoint, classes: ClassTable) -> np.ndarray:
    own = (point.primary_k, point.threshold)
    return encode_control(enabled=point.enabled, num_valid=-1, classes=[own, *classes]).numpy()
