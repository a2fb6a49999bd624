"""A layer's expert weights in the order in which the CPU MoE runner's kernels read them.

Vector kernels read blocks of 16 weight rows, column by column: then a register's lanes are weight
rows, and none is left to add up. AMX reads rows as they are. A block takes the place of its rows,
so weights are packed where they are, without a second copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

BLOCK = 16
"""Weight rows of a block; what sizes are padded to."""


@dataclass(frozen=True)
class PackedExperts:
    """Of one layer, for the kernels `module` of one instruction set.

    w13: ``[E, 2I', H']``, w2: ``[E, H', I']``, where ``H'`` and ``I'`` are the hidden and the
    intermediate size rounded up to multiples of `BLOCK`; packed where `in_blocks`.
    """

    module: Any
    w13: torch.Tensor
    w2: torch.Tensor
    hidden_size: int
    inter_size: int
    in_blocks: bool

    @classmethod
    def pack(
        cls, module: Any, w13: torch.Tensor, w2: torch.Tensor, *, in_place: bool
    ) -> PackedExperts:
        """Of rows ``[E, 2I, H]`` (gate rows, then up rows) and ``[E, H, I]``, bfloat16 or float32.

        in_place: the tensors are the caller's to change; they are, where their sizes are multiples
            of `BLOCK`. What is padded is a copy in any case.
        """
        hidden_size, inter_size = w2.shape[1:]
        in_blocks = bool(module.reads_blocks(w2.dtype == torch.bfloat16, hidden_size, inter_size))
        padded_w13 = _padded(w13.unflatten(1, (2, inter_size))).flatten(1, 2)
        padded_w2 = _padded(w2)
        if in_blocks:
            owned = in_place or padded_w2.data_ptr() != w2.data_ptr()
            padded_w13, padded_w2 = (w if owned else w.clone() for w in (padded_w13, padded_w2))
            module.pack(padded_w13, False)
            module.pack(padded_w2, False)
        return cls(module, padded_w13, padded_w2, hidden_size, inter_size, in_blocks)

    def unpack(self) -> None:
        """Put the rows back in place; this object is of no use from then on."""
        if self.in_blocks:
            self.module.pack(self.w13, True)
            self.module.pack(self.w2, True)


def _padded(matrices: torch.Tensor) -> torch.Tensor:
    """``[..., rows, depth]`` with both rounded up, the same tensor where they are."""
    rows, depth = (-size % BLOCK for size in matrices.shape[-2:])
    return F.pad(matrices, (0, depth, 0, rows)) if rows or depth else matrices
