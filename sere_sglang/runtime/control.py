"""The device-side control block: how an operating point reaches a running CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sere_sglang.names import SIMILARITY
from sere_sglang.ops import CONTROL_WORDS, encode_control
from sere_sglang.runtime.graph_rules import RuleWords
from sere_sglang.schedule.point import OFF, OperatingPoint

# More forwards than the overlap scheduler can ever have in flight.
_RING = 16
_LAYER_BYTES = 4 * CONTROL_WORDS
_WORD_NUM_VALID = 1  # of both kinds of blocks
_MAX_TEMPLATES = 256

ClassTable = tuple[tuple[int, float], ...]
"""(S, rho) of the row classes beyond class 0, which runs at the operating point."""


class ControlBlock:
    """What every layer's kernel reads, in one buffer that is written before a forward.

    words: int32 ``[layers, 16]`` (`ops.control`), one block per layer.
    rule_words: int32 ``[layers, 16]`` (`ops.rule_block`), likewise; None without `rules`.
    row_class: uint8 ``[max_rows]``, read only while the blocks name more than one class.

    On a GPU each write goes from its own pinned slot, on the current (forward) stream, without
    synchronizing: stream order keeps the words stable for a graph that is still running, the
    ring keeps a slot stable until its copy is done. Nothing is allocated.
    """

    def __init__(
        self,
        device: torch.device,
        layer_ids: Sequence[int],
        max_rows: int,
        rules: Mapping[int, RuleWords] | None = None,
    ) -> None:
        """rules: of each layer, where kernels read the rules beside ``similarity`` here too."""
        self.max_rows = max_rows
        self._layer_ids = tuple(layer_ids)
        self._rules = rules
        layers = len(self._layer_ids)
        self._words_bytes = _LAYER_BYTES * layers * (1 if rules is None else 2)
        size = self._words_bytes + max_rows
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        words = self._device[: self._words_bytes].view(torch.int32).view(-1, CONTROL_WORDS)
        self.words = words[:layers]
        self.rule_words = None if rules is None else words[layers:]
        self.row_class = self._device[self._words_bytes :]
        self._templates: dict[tuple[object, ...], np.ndarray] = {}
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
        *,
        fast_keep: int = 1,
        surrogates: bool = False,
    ) -> None:
        """Set what the coming forward runs at.

        Args:
            point: of the rows of class 0.
            num_valid: real rows; those behind are padding. -1: every row is real.
            row_class: class of each real row; empty when all are of class 0.
            classes: (S, rho) of class 1, 2, ... when `row_class` is given.
            fast_keep, surrogates: of a rule beside ``similarity`` (`RuleForward`).
        """
        if not point.enabled:
            point, num_valid, row_class = OFF, 0, b""
        of_rule = (fast_keep, surrogates) if point.rule != SIMILARITY else ()
        key = (point, num_valid, row_class, classes if row_class else (), of_rule)
        if key == self._last:
            return
        self._last = key
        host = self._host[self._next]
        if self._pinned:
            # Returns at once unless _RING forwards are still queued.
            self._copied[self._next].synchronize()
        words = host[: self._words_bytes].view(np.int32).reshape(-1, CONTROL_WORDS)
        words[:] = self._template(point, classes if row_class else (), fast_keep, surrogates)
        words[:, _WORD_NUM_VALID] = num_valid
        size = self._words_bytes + len(row_class)
        host[self._words_bytes : size] = np.frombuffer(row_class, dtype=np.uint8)
        self._device[:size].copy_(self._slots[self._next, :size], non_blocking=True)
        if self._pinned:
            self._copied[self._next].record()
            self._next = (self._next + 1) % _RING

    def _template(
        self, point: OperatingPoint, classes: ClassTable, fast_keep: int, surrogates: bool
    ) -> np.ndarray:
        """The blocks of all layers, int32 ``[layers, 16]`` or twice that, for any number of
        rows."""
        key = (point, classes, fast_keep, surrogates)
        known = self._templates.get(key)
        if known is None:
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            own = [point.at(layer) for layer in self._layer_ids]
            # What the rules' kernels do, those of similarity leave alone.
            to_rules = self._rules is not None and point.rule != SIMILARITY
            rows = [_encode(OFF if to_rules else each, classes) for each in own]
            if self._rules is not None:
                has_classes = len(classes) > 0
                rows += [
                    self._rules[layer].of(
                        each, fast_keep=fast_keep, surrogates=surrogates, classes=has_classes
                    )
                    for layer, each in zip(self._layer_ids, own, strict=True)
                ]
            known = self._templates[key] = np.stack(rows)
        return known


@functools.lru_cache(maxsize=_MAX_TEMPLATES)
def _encode(point: OperatingPoint, classes: ClassTable) -> np.ndarray:
    own = (point.primary_k, point.threshold)
    return encode_control(enabled=point.enabled, num_valid=-1, classes=[own, *classes]).numpy()
