"""A sample of one layer's tokens, with what its router made of them, to try rules on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sere_sglang.calibration.surrogates import HELD_EVERY
from sere_sglang.ops.reroute import MAX_TOP_K

_MOST = 1024  # tokens
GROUP = 32
"""Tokens that are looked at together; a sample is of whole groups."""


def token_bytes(num_experts: int, hidden: int) -> int:
    """Bytes of one token of a sample, at most: its input, its scores, its slots and its key."""
    return 4 * hidden + 4 * num_experts + 8 * MAX_TOP_K + 8


def sample_tokens(memory: int, num_experts: int, hidden: int, layers: int) -> int:
    """Tokens to keep of each of `layers` at once: all their samples take an eighth of `memory`."""
    fitting = memory // (8 * layers * token_bytes(num_experts, hidden))
    return min(int(fitting), _MOST) // GROUP * GROUP


class TokenSample:
    """Of all tokens that count those with the lowest keys, which scatter their places in the text:
    no two next to each other stem from one sequence but by chance, as in a decode batch.

    Which ones does not depend on how the text is cut into batches. `parts` is all of its state:

        keys     [n]    int64     ascending
        rows     [n, H]           the layer's input
        ids      [n, K] int32     -1 for what is no expert
        weights  [n, K] float32
        scores   [n, E] float32   of all experts; absent where the router exposes none
    """

    def __init__(self, size: int, sequence: int | None) -> None:
        """sequence: tokens of a sequence, where only held-out ones count; None where all do."""
        self.size = size
        self.sequence = sequence
        self.parts: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.parts["keys"]) if self.parts else 0

    def add(
        self,
        first: int,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        scores: torch.Tensor | None,
    ) -> None:
        """Look at tokens [n, ...] of which `first` tokens of the text are in front."""
        places = torch.arange(first, first + len(rows), device=rows.device)
        keys = _scattered(places)
        counts = torch.ones_like(keys, dtype=torch.bool)
        if self.sequence is not None:
            counts = places // self.sequence % HELD_EVERY == HELD_EVERY - 1
        if self.size and len(self) == self.size:
            counts = counts & (keys < self.parts["keys"][-1])
        chosen = counts.nonzero()[:, 0]
        if not self.size or not len(chosen):
            return
        new = {"keys": keys, "rows": rows, "ids": ids.to(torch.int32), "weights": weights.float()}
        if scores is not None:
            new["scores"] = scores.float()
        new = {name: part[chosen] for name, part in new.items()}
        if self.parts:
            both = self.parts.keys() & new.keys()
            new = {name: torch.cat((self.parts[name], new[name])) for name in both}
        order = new["keys"].argsort()[: self.size]
        self.parts = {name: part[order] for name, part in new.items()}

    def restore(self, kept: Mapping[str, torch.Tensor]) -> None:
        self.parts = dict(kept)


def _scattered(places: torch.Tensor) -> torch.Tensor:
    """int64, one to one, and as if drawn: a step of SplitMix64."""
    x = (places + 1) * -0x61C8864680B583EB
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
