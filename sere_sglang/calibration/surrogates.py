"""Streamed sums of which a surrogate for each expert is fitted: an affine map of its own input.

They run over the tokens that the router sends to an expert, x being the layer's input and y the
expert's output without its routing weight; nothing of the size of the text is kept. Every fourth
sequence is held out: its tokens go into sums of their own, on which `surrogate_fit` judges.

A token's weight bounds its influence. Where a few tokens with massive activations hold nearly all
of an expert's energy, least squares follows them and is worse than nothing on new tokens; so |y|^2
counts at most `BOUND` times what is usual for the expert.
"""

from __future__ import annotations

import torch

HELD_EVERY = 4
"""Of so many sequences one is held out."""

BOUND = 32.0
"""Largest energy of a token, in units of the expert's usual one: (mean of |y|^(1/2))^4, which a few
huge tokens hardly move and experts that are often silent do not make zero."""

_PAIRED = 1 << 22  # elements of all experts' outputs that are multiplied at once


def sums_bytes(num_experts: int, hidden: int) -> int:
    """Bytes of one layer's sums: of x x^T and x y^T, for fitting and held out, in float32."""
    return 2 * 2 * 4 * num_experts * hidden * hidden


class SurrogateSums:
    """Running sums of one layer; `sums` is all of its state.

    In `sums`, the leading 2 being tokens to fit on and held-out ones, w the weight of a token:

        xx, xy       [2, E, H, H] float32   w x x^T, w x y^T
        x, y         [2, E, H]    float64   w x, w y
        energy       [2, E]       float64   w |y|^2
        weight       [2, E]       float64   w
        count        [2, E]       int64     1
        cross        [2, E, E]    float64   [i, j]: w_i y_i . y_j over the tokens of expert i
        energy_other [2, E, E]    float64   [i, j]: w_i |y_j|^2 over the tokens of expert i
        root         [E]          float64   |y|^(1/2)
        plain_energy [E]          float64   |y|^2, without weight
    """

    def __init__(
        self, num_experts: int, hidden: int, sequence: int, device: torch.device | str = "cpu"
    ) -> None:
        """sequence: tokens of a sequence, of which whole ones are held out."""
        self.num_experts = num_experts
        self.hidden = hidden
        self.sequence = sequence
        e, h, f64 = num_experts, hidden, torch.float64
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "xx": ((2, e, h, h), torch.float32),
            "xy": ((2, e, h, h), torch.float32),
            "x": ((2, e, h), f64),
            "y": ((2, e, h), f64),
            "energy": ((2, e), f64),
            "weight": ((2, e), f64),
            "count": ((2, e), torch.int64),
            "cross": ((2, e, e), f64),
            "energy_other": ((2, e, e), f64),
            "root": ((e,), f64),
            "plain_energy": ((e,), f64),
        }
        self.sums = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in shapes.items()
        }

    def update(
        self, rows: torch.Tensor, outputs: torch.Tensor, routed: torch.Tensor, first: int
    ) -> None:
        """Add a block of tokens.

        Args:
            rows: floating point ``[n, H]``, the layer's input.
            outputs: floating point ``[E, n, H]``, every expert's output for them.
            routed: bool ``[n, E]``, which experts the router sends each token to.
            first: tokens of the text in front of the block.
        """
        at = torch.arange(first, first + len(rows), device=rows.device) // self.sequence
        held = at % HELD_EVERY == HELD_EVERY - 1
        energy = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float64).square_()  # [E, n]
        weight = self._weights(energy, routed.T)
        for part, chosen in enumerate((~held, held)):
            tokens = chosen.nonzero()[:, 0]
            if not len(tokens):
                continue
            own, theirs = weight[:, tokens], energy[:, tokens]
            self.sums["weight"][part] += own.sum(1)
            self.sums["energy"][part] += (own * theirs).sum(1)
            self.sums["count"][part] += routed[tokens].sum(0)
            self.sums["energy_other"][part] += own @ theirs.T
            self._pairs(part, outputs, tokens, own)
            for expert in range(self.num_experts):
                sent = tokens[routed[tokens, expert]]
                self._products(
                    part, expert, rows[sent], outputs[expert, sent], weight[expert, sent]
                )

    def _weights(self, energy: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        """float64 [E, n]: 0 where a token is not the expert's, else what bounds its influence.

        The expert's usual energy is that of all tokens so far, these included.
        """
        self.sums["root"] += (energy.pow(0.25) * sent).sum(1)
        self.sums["plain_energy"] += (energy * sent).sum(1)
        tokens = self.sums["count"].sum(0) + sent.sum(1)
        usual = (self.sums["root"] / tokens.clamp(min=1)).pow(4)
        bounded = BOUND * usual[:, None] / energy.clamp(min=torch.finfo(torch.float64).tiny)
        return bounded.clamp_(max=1).masked_fill_(energy == 0, 1) * sent

    def _pairs(
        self, part: int, outputs: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor
    ) -> None:
        step = max(1, _PAIRED // (self.num_experts * self.hidden))
        for some, own in zip(tokens.split(step), weight.split(step, dim=1), strict=True):
            y = outputs[:, some].to(torch.float32)
            weighted = y * own.to(torch.float32)[:, :, None]
            self.sums["cross"][part] += (weighted.flatten(1) @ y.flatten(1).T).to(torch.float64)

    def _products(
        self, part: int, expert: int, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor
    ) -> None:
        self.sums["x"][part, expert] += weight @ x.to(torch.float64)
        self.sums["y"][part, expert] += weight @ y.to(torch.float64)
        root = weight.sqrt().to(torch.float32)[:, None]
        x, y = x.to(torch.float32) * root, y.to(torch.float32) * root
        self.sums["xx"][part, expert].addmm_(x.T, x)
        self.sums["xy"][part, expert].addmm_(x.T, y)
