"""The control block: what a forward runs at, as 16 int32 words in device memory.

Kernels read it, the scheduler side writes it before a forward, so one captured graph serves every
operating point. Layout (word: meaning):

    0      enabled, 0 or 1
    1      num_valid; rows >= it are padding, negative means every row is valid
    2      num_classes, 1..4
    3      reserved, 0
    4..7   S (``primary_k``) per class, int32
    8..11  rho (``threshold``) per class, the bits of a float32
    12..15 reserved, 0

Class 0 is the class of every row when no row classes are given.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

CONTROL_WORDS = 16
MAX_CLASSES = 4
WORD_ENABLED = 0
WORD_NUM_VALID = 1
WORD_NUM_CLASSES = 2
WORD_PRIMARY_K = 4
WORD_THRESHOLD = 8

_LAYOUT = struct.Struct("=4i4i4f4i")


@dataclass(frozen=True)
class Control:
    """A control block, decoded. ``classes`` holds (S, rho) per class, rho as the float32 stored."""

    enabled: bool
    num_valid: int
    classes: tuple[tuple[int, float], ...]


def encode_control(
    *, enabled: bool, num_valid: int, classes: Sequence[tuple[int, float]]
) -> torch.Tensor:
    """Pack a control block.

    Args:
        enabled: whether this forward re-routes at all.
        num_valid: rows that hold real tokens; negative for all.
        classes: 1 to 4 pairs (S, rho); a row of class ``c`` votes and moves by pair ``c``.

    Returns:
        int32 ``[16]`` on the CPU; copy it to where the ids are.

    Raises:
        ValueError: no class, more than four, or a rho outside [0, 1].
    """
    if not 1 <= len(classes) <= MAX_CLASSES:
        raise ValueError(f"a control block holds 1 to {MAX_CLASSES} classes, got {len(classes)}")
    for _, threshold in classes:
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    unused = MAX_CLASSES - len(classes)
    words = _LAYOUT.pack(
        int(enabled),
        num_valid,
        len(classes),
        0,
        *(primary_k for primary_k, _ in classes),
        *[0] * unused,
        *(threshold for _, threshold in classes),
        *[0.0] * unused,
        *[0] * 4,
    )
    return torch.frombuffer(bytearray(words), dtype=torch.int32)


def decode_control(control: torch.Tensor) -> Control:
    """The inverse of `encode_control`, for tests and debugging (synchronizes a CUDA tensor)."""
    words = _LAYOUT.unpack(control.detach().cpu().contiguous().numpy().tobytes())
    num_classes = min(max(words[WORD_NUM_CLASSES], 1), MAX_CLASSES)
    primary_ks = words[WORD_PRIMARY_K : WORD_PRIMARY_K + num_classes]
    thresholds = words[WORD_THRESHOLD : WORD_THRESHOLD + num_classes]
    return Control(
        enabled=words[WORD_ENABLED] != 0,
        num_valid=words[WORD_NUM_VALID],
        classes=tuple(zip(primary_ks, thresholds, strict=True)),
    )
