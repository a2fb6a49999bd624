"""Similarity of experts from streamed second moments of their outputs.

With y_i(t) the output of expert i for token t, nothing of size E x T x H is ever needed: every
measure here follows from sums over tokens of y_i(t) . y_j(t), kept in float64 because the
distance of two similar experts is a small difference of large sums.

Measures and their quirks are those of the SERE paper's public code: `frobenius` is 1 - d / max d,
`cosine` is (1 + mean cosine) / 2, the diagonal is 1. `residual` is ours: 1 minus the share of
expert i's output energy that the best scalar multiple of expert j leaves unexplained; that
multiple is the substitution scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MOMENT_MEASURES = ("frobenius", "cosine", "residual")
WEIGHTINGS = ("all", "routed")

_TWINS = 1e-13  # of the energy; outputs in bfloat16 tell nothing below 1e-5 of it
_COSINE_EPS = 1e-8  # torch.nn.functional.cosine_similarity's floor for a norm


class Moments:
    """Running sums over the tokens of one layer; `sums` is all of its state.

    Args:
        num_experts: E.
        measures: what will be asked of it; only cosine needs sums of its own.
        weighting: ``all`` counts every token for every pair; ``routed`` counts for the pair
            (i, j) the tokens that the router sends to i or to j.
        device: where `update` gets its tensors.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        measures: tuple[str, ...] = MOMENT_MEASURES,
        weighting: str = "all",
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_experts = num_experts
        self.weighting = weighting
        names = ["gram"]
        if "cosine" in measures:
            names.append("cosine")
        if weighting == "routed":
            # one: sum over tokens routed to i; both: over tokens routed to i and to j.
            names += [f"{name}_{part}" for name in tuple(names) for part in ("one", "both")]
            names += ["energy_one", "energy_both"]
        square = (num_experts, num_experts)
        self.sums = {
            name: torch.zeros(square, dtype=torch.float64, device=device) for name in names
        }
        self.sums["coactivation"] = torch.zeros(square, dtype=torch.int64, device=device)
        self.sums["num_tokens"] = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, outputs: torch.Tensor, routed: torch.Tensor) -> None:
        """Add tokens.

        Args:
            outputs: floating point ``[E, T, H]``, every expert's output for the same tokens.
            routed: bool ``[T, E]``, which experts the router sends each token to.
        """
        sent = routed.T.to(torch.float64)  # [E, T]
        self.sums["num_tokens"] += outputs.shape[1]
        self.sums["coactivation"] += (sent @ sent.T).to(torch.int64)
        y = outputs.to(torch.float64, copy=True)
        energy = y.square().sum(-1)  # [E, T]
        self._add("gram", y, sent)
        if self.weighting == "routed":
            self.sums["energy_one"] += energy @ sent.T  # [i, j]: |y_i|^2 where routed to j
            self.sums["energy_both"] += (energy * sent) @ sent.T
        if "cosine" in self.sums:
            norms = energy.sqrt().clamp_(min=_COSINE_EPS)
            self._add("cosine", y.div_(norms[:, :, None]), sent)

    def _add(self, name: str, y: torch.Tensor, sent: torch.Tensor) -> None:
        flat = y.view(y.shape[0], -1)
        self.sums[name] += flat @ flat.T
        if self.weighting == "routed":
            own = (y * sent[:, :, None]).view_as(flat)
            self.sums[f"{name}_one"] += own @ flat.T
            self.sums[f"{name}_both"] += own @ own.T

    @property
    def num_tokens(self) -> int:
        return int(self.sums["num_tokens"])

    @property
    def coactivation(self) -> torch.Tensor:
        """int64 [E, E]: tokens routed to both i and j; the diagonal is the popularity."""
        return self.sums["coactivation"]

    def pairs(self, name: str = "gram") -> PairSums:
        """The sums that count for each pair under this weighting. name: ``gram`` or ``cosine``."""
        gram = _symmetric(self.sums["gram"])
        total = gram if name == "gram" else _symmetric(self.sums[name])
        every = torch.full_like(gram, self.num_tokens)
        energy = gram.diagonal()[:, None].expand_as(gram)
        if self.weighting == "all":
            return PairSums(total, energy, every)
        either = self.sums[f"{name}_one"] + self.sums[f"{name}_one"].T
        either = either - _symmetric(self.sums[f"{name}_both"])
        own = self.sums["energy_one"].diagonal()[:, None]
        energy_either = own + self.sums["energy_one"] - self.sums["energy_both"]
        popularity = self.coactivation.diagonal()
        count = (popularity[:, None] + popularity - self.coactivation).to(torch.float64)
        # A pair that no token uses says nothing of its own: fall back to all tokens.
        used = count > 0
        return PairSums(
            torch.where(used, either, total),
            torch.where(used, energy_either, energy),
            torch.where(used, count, every),
        )


@dataclass(frozen=True)
class PairSums:
    """Sums over the tokens that count for the pair (i, j), float64 [E, E].

    dot: y_i . y_j; energy: |y_i|^2, not symmetric; count: number of tokens.
    """

    dot: torch.Tensor
    energy: torch.Tensor
    count: torch.Tensor


def similarity(moments: Moments, measure: str) -> torch.Tensor:
    """float32 [E, E] in [0, 1], symmetric, 1 on the diagonal. measure: of `MOMENT_MEASURES`."""
    if moments.num_tokens == 0:
        raise ValueError("no tokens were collected")
    if measure == "frobenius":
        pairs = moments.pairs()
        energies = pairs.energy + pairs.energy.T
        squared = energies - 2 * pairs.dot
        # Below that it is the rounding of the sums: such experts are twins.
        squared = torch.where(squared > _TWINS * energies, squared, 0.0)
        # A mean, so that pairs with different tokens compare; without weighting it cancels.
        distance = (squared / pairs.count).sqrt_()
        distance.fill_diagonal_(0)
        largest = distance.max()
        matrix = 1 - distance / largest if largest > 0 else torch.ones_like(distance)
    elif measure == "cosine":
        pairs = moments.pairs("cosine")
        matrix = (1 + pairs.dot / pairs.count) / 2
    elif measure == "residual":
        pairs = moments.pairs()
        energies = pairs.energy * pairs.energy.T
        matrix = torch.where(energies > 0, pairs.dot.square() / energies, 0.0)
    else:
        raise ValueError(f"unknown measure {measure!r}; choose from {', '.join(MOMENT_MEASURES)}")
    return as_similarity(matrix)


def substitution_scale(moments: Moments) -> torch.Tensor:
    """float32 [E, E]: scale[i, j] * y_j is the multiple of expert j closest to expert i."""
    pairs = moments.pairs()
    energy = pairs.energy.T
    scale = torch.where(energy > 0, pairs.dot / energy, 0.0)
    return scale.fill_diagonal_(1).to(torch.float32)


def as_similarity(matrix: torch.Tensor) -> torch.Tensor:
    """What a profile holds: float32, clamped to [0, 1], exactly symmetric, 1 on the diagonal."""
    matrix = _symmetric(matrix).clamp_(0, 1).to(torch.float32)
    return matrix.fill_diagonal_(1).contiguous()


def _symmetric(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix + matrix.T) / 2
