"""The energy of the residual stream behind a layer: what the layer's error stands beside.

The next norm divides every token by its own size, so what counts is a typical token's: the
geometric mean, which a few tokens with massive activations hardly move.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_UNIT = 1 << 32  # of the sum of logarithms


class StreamEnergy:
    """Running sums of one layer; `sums` is all of its state.

    stream_log     [1] int64   log2 |x|^2 of every token, in 2^-32: whole numbers, so that the sum
                               does not depend on how the text was cut into batches
    stream_tokens  [1] int64   tokens that are no zeros
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        names = ("stream_log", "stream_tokens")
        self.sums = {n: torch.zeros(1, dtype=torch.int64, device=device) for n in names}

    def add(self, rows: torch.Tensor) -> None:
        """rows: floating point ``[n, H]``."""
        energy = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).square_()
        some = energy > 0
        self.sums["stream_log"] += (energy[some].log2() * _UNIT).to(torch.int64).sum()
        self.sums["stream_tokens"] += some.sum()

    def restore(self, kept: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self.sums.items():
            if name in kept:
                tensor.copy_(kept[name])


def stream_energy(sums: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """float32 ``[1]``: the geometric mean of |x|^2; None where no token was seen."""
    if "stream_tokens" not in sums or not (tokens := int(sums["stream_tokens"])):
        return None
    return (sums["stream_log"].double() / _UNIT / tokens).exp2().float().cpu()
