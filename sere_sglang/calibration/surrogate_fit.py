"""From sums to surrogates: reduced-rank ridge regression y ~ b + U V^T x per expert.

With A = xx + ridge (centred), the rank-r map that fits best is (A^-1 xy) P P^T, P the leading r
eigenvectors of xy^T A^-1 xy. So P is U, and V = A^-1 xy P; a smaller rank is a prefix of a larger
one, and what each further column gains on held-out tokens follows from their sums alone.

Ridge and rank are those with the least error on held-out tokens, expert by expert. Where no map
beats the mean there, the expert gets its mean (U = V = 0), and where the mean does not beat
nothing, nothing (b = 0 too).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sere_sglang.calibration.collection import SurrogateSpec
from sere_sglang.calibration.surrogates import SurrogateSums
from sere_sglang.errors import SereError
from sere_sglang.profile.container import LARGEST_FILE

RANKS = (4, 8, 16, 32, 64)
"""Ranks that are evaluated, as far as they are not above H."""

RIDGES = (0.003, 0.02, 0.07, 0.25, 1.0, 5.0)
"""Ridges that are tried, in units of the median variance of the inputs' channels, per token."""

WORTH = 3.0
"""See `worthwhile_rank`."""

_LEAST_TOKENS = 16  # of an expert, to fit on and held out; below, nothing is known of it
_SPARE = 16  # columns beyond the largest rank, for the accuracy of the last ones
_ROUNDS = 4  # of the subspace iteration
_AT_ONCE = 1 << 21  # elements of one batched matrix


def evaluated_ranks(
    spec: SurrogateSpec, num_experts: int, hidden: int, layers: int
) -> tuple[int, ...]:
    """Ascending. Raises `SereError` for a rank above H, or one whose profile nobody would read."""
    fitting = int(0.9 * LARGEST_FILE) // (4 * layers * num_experts * hidden)
    if spec.rank is not None and spec.rank > hidden:
        raise SereError(
            f"{spec.flag} is above the model's hidden size {hidden}; give at most that, or auto"
        )
    if fitting < (spec.rank or 1):
        instead = f"at most {fitting}" if fitting else "no --surrogate-rank"
        raise SereError(
            f"{spec.flag}: {layers} layers of {num_experts} experts make a profile of more than "
            f"{LARGEST_FILE >> 30} GiB; give {instead}"
        )
    ranks = {rank for rank in RANKS if rank <= min(hidden, fitting)}
    return tuple(sorted(ranks | ({spec.rank} if spec.rank else set()) or {1}))


def worthwhile_rank(explained: Sequence[float], ranks: Sequence[int], rank_share: float) -> int:
    """The smallest rank beyond which a further one is not worth its bytes; 0 for the mean alone.

    A lost expert's bytes are spent on its surrogate; the same bytes could load experts instead. A
    step that explains d more of a lost expert's energy with a share s of an expert's bytes is worth
    it while d / s is at least `WORTH` times 1 - x, what loading an expert whole gains over its
    surrogate (x explained) per expert's bytes. `WORTH` is above 1 because the next expert to be
    loaded is the heaviest of the lost ones: on the demo model it has 2 to 2.5 times their mean
    energy, and loading it takes 3 times as much off the KL as one of the lost ones has in the mean.
    The first step that is not worth it ends the search.

    Args:
        explained: held-out share of the energy by the mean, then by each of `ranks`.
        ranks: ascending.
        rank_share: bytes of one rank as a share of an expert's.
    """
    rank, now = 0, explained[0]
    for larger, then in zip(ranks, explained[1:], strict=True):
        gained, asked = then - now, WORTH * (1 - now) * (larger - rank) * rank_share
        if gained <= 0 or gained < asked:
            break
        rank, now = larger, then
    return rank


def fit_surrogates(
    sums: SurrogateSums, ranks: Sequence[int], rank: int | None, expert_bytes: float
) -> dict[str, torch.Tensor]:
    """The tables of one layer, on the CPU (`profile.tables` has their shapes).

    Args:
        sums: of the whole text.
        ranks: ascending, those to evaluate; holds `rank`.
        rank: largest one to use; None for `worthwhile_rank` of this layer.
        expert_bytes: weights of one expert.
    """
    held = _Held.of(sums)
    largest = ranks[-1]
    gains = torch.cat([_gains(batch, largest) for batch in _batches(sums)])  # [E, ridge, rank]
    gains[~held.enough] = 0
    best = gains.amax(1).cummax(1).values  # [E, rank], over ridges, then over smaller ranks
    by_rank = [held.explained(held.mean_error - best[:, r - 1]) for r in ranks]
    floor = held.explained(held.mean_error)
    served = [s.maximum(floor).clamp(min=0) for s in by_rank]
    if rank is None:
        shares = [floor.clamp(min=0), *served]
        means = [s[held.used].mean().item() if held.used.any() else 0.0 for s in shares]
        rank = worthwhile_rank(means, ranks, 4 * sums.hidden / expert_bytes)
    tables = _stored(sums, held, gains[:, :, :rank], largest)
    rows = [_best_other(sums, held), floor, *served, tables.pop("explained")]
    return {
        **tables,
        "surrogate_ranks": torch.tensor(ranks, dtype=torch.int64),
        "surrogate_explained": torch.stack(rows).to(torch.float32).cpu(),
        "expert_energy": (
            sums.sums["plain_energy"] / sums.sums["count"].sum(0).clamp(min=1)
        ).to(torch.float32).cpu(),
        "expert_bytes": torch.full((sums.num_experts,), round(expert_bytes), dtype=torch.int64),
    }  # fmt: skip


@dataclass(frozen=True)
class _Held:
    """Of held-out tokens: [E] each. enough: tokens to judge by. used: had any token at all."""

    energy: torch.Tensor
    mean_error: torch.Tensor
    enough: torch.Tensor
    used: torch.Tensor

    @classmethod
    def of(cls, sums: SurrogateSums) -> _Held:
        s = sums.sums
        mean = s["y"][0] / s["weight"][0].clamp(min=1e-300)[:, None]
        error = s["energy"][1] - 2 * (mean * s["y"][1]).sum(1)
        error += s["weight"][1] * mean.square().sum(1)
        enough = (s["count"] >= _LEAST_TOKENS).all(0) & (s["energy"][1] > 0)
        return cls(s["energy"][1], error, enough, s["count"].sum(0) > 0)

    def explained(self, error: torch.Tensor) -> torch.Tensor:
        """float64 [E]: 1 - error / energy, 0 for an expert with too few tokens."""
        share = 1 - error / self.energy.clamp(min=torch.finfo(torch.float64).tiny)
        return torch.where(self.enough, share, 0.0)


def _best_other(sums: SurrogateSums, held: _Held) -> torch.Tensor:
    """float64 [E]: held-out share explained by the best multiple of another expert's output.

    Which one, and its multiple, are those of the tokens to fit on.
    """
    cross, other = sums.sums["cross"], sums.sums["energy_other"]
    scale = torch.where(other[0] > 0, cross[0] / other[0], 0.0)
    gain = (scale * cross[0]).fill_diagonal_(-1)
    best = gain.argmax(1, keepdim=True)
    scale, along, energy = (t.gather(1, best)[:, 0] for t in (scale, cross[1], other[1]))
    return held.explained(held.energy - 2 * scale * along + scale.square() * energy)


@dataclass(frozen=True)
class _Batch:
    """Some experts' sums in float64, centred at the weighted means of the tokens to fit on.

    xx, xy, held_xx, held_xy: [B, H, H]. mean_x, mean_y: [B, H]. unit: [B], of the ridge.
    """

    experts: slice
    xx: torch.Tensor
    xy: torch.Tensor
    held_xx: torch.Tensor
    held_xy: torch.Tensor
    mean_x: torch.Tensor
    mean_y: torch.Tensor
    unit: torch.Tensor

    def leading(self, ridge: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
        """V [B, H, rank], U [B, H, rank], best column first, and bool [B]: could be solved.

        ridge: [B], in units of `unit`. U has orthonormal columns.
        """
        hidden = self.xx.shape[-1]
        identity = torch.eye(hidden, dtype=self.xx.dtype, device=self.xx.device)
        shifted = self.xx.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_((ridge * self.unit)[:, None])
        root, failed = torch.linalg.cholesky_ex(shifted)
        solved = failed == 0
        root[~solved] = identity
        width = min(hidden, rank + _SPARE)
        if 2 * width >= hidden:
            basis = identity.expand(len(ridge), hidden, hidden)
        else:  # the leading ones are enough, and nothing here costs H^3 but the root
            start = torch.Generator().manual_seed(0)
            basis = torch.randn(hidden, width, generator=start, dtype=self.xx.dtype)
            basis = basis.to(self.xx.device).expand(len(ridge), hidden, width)
            for _ in range(_ROUNDS):
                image = self.xy.mT @ _solve(root, self.xy @ basis)
                basis = torch.linalg.qr(image).Q
        along = self.xy @ basis
        image = _solve(root, along)
        inner = along.mT @ image
        vectors = torch.linalg.eigh((inner + inner.mT) / 2).eigenvectors.flip(-1)[..., :rank]
        return image @ vectors, basis @ vectors, solved


def _solve(root: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """As `torch.cholesky_solve`, which takes twice the time."""
    half = torch.linalg.solve_triangular(root, right, upper=False)
    return torch.linalg.solve_triangular(root.mT, half, upper=True)


def _batches(sums: SurrogateSums) -> Iterator[_Batch]:
    step = max(1, _AT_ONCE // sums.hidden**2)
    for start in range(0, sums.num_experts, step):
        experts = slice(start, start + step)
        part = {name: sums.sums[name][:, experts].double() for name in ("xx", "xy", "x", "y")}
        weight = sums.sums["weight"][:, experts]
        mean = {n: part[n][0] / weight[0].clamp(min=1e-300)[:, None] for n in ("x", "y")}
        centred = {}
        for name in ("x", "y"):
            outer = mean["x"][:, :, None] * part[name][:, :, None, :]
            outer += part["x"][:, :, :, None] * mean[name][:, None, :]
            both = mean["x"][:, :, None] * mean[name][:, None, :]
            centred[name] = part[f"x{name}"] - outer + weight[:, :, None, None] * both
        variances = centred["x"][0].diagonal(dim1=-2, dim2=-1)
        middle = variances.median(-1).values
        unit = torch.where(middle > 0, middle, variances.mean(-1)).clamp(min=1e-30)
        yield _Batch(
            experts, centred["x"][0], centred["y"][0], centred["x"][1], centred["y"][1],
            mean["x"], mean["y"], unit,
        )  # fmt: skip


def _gains(batch: _Batch, rank: int) -> torch.Tensor:
    """float64 [B, ridges, rank]: held-out energy explained beyond the mean by the first columns."""
    gains = []
    for ridge in RIDGES:
        v, u, solved = batch.leading(torch.full_like(batch.unit, ridge), rank)
        # U's columns are orthonormal, so every column's gain is its own.
        gain = 2 * (v * (batch.held_xy @ u)).sum(1) - (v * (batch.held_xx @ v)).sum(1)
        gains.append(torch.where(solved[:, None], gain.cumsum(1), float("-inf")))
    return torch.stack(gains, 1)


def _stored(
    sums: SurrogateSums, held: _Held, gains: torch.Tensor, largest: int
) -> dict[str, torch.Tensor]:
    """surrogate_in, _out, _bias as they are stored, and ``explained`` by them, float64 [E].

    gains: [E, ridges, r], r the rank of the layer.
    """
    experts, hidden, rank = sums.num_experts, sums.hidden, gains.shape[-1]
    device = gains.device
    v = torch.zeros(experts, rank, hidden, dtype=torch.bfloat16, device=device)
    u = torch.zeros_like(v)
    bias = torch.zeros(experts, hidden, dtype=torch.bfloat16, device=device)
    mean_x = sums.sums["x"][0] / sums.sums["weight"][0].clamp(min=1e-300)[:, None]
    mean_y = sums.sums["y"][0] / sums.sums["weight"][0].clamp(min=1e-300)[:, None]
    if rank:
        best, place = gains.flatten(1).max(1)
        ridge = torch.tensor(RIDGES, dtype=torch.float64, device=device)[place // rank]
        own_rank = torch.where(best > 0, place % rank + 1, 0)
        for batch in _batches(sums):
            own = batch.experts
            # As wide as before, or the columns would not be those that were judged.
            factors = batch.leading(ridge[own], largest)[:2]
            kept = torch.arange(rank, device=device) < own_rank[own, None]
            v[own], u[own] = (
                (f[..., :rank] * kept[:, None]).mT.to(torch.bfloat16) for f in factors
            )
    through = torch.einsum("erh,eri,ei->eh", u.double(), v.double(), mean_x)
    bias.copy_(mean_y - through)
    explained = held.explained(_error(sums, v, u, bias))
    mean = mean_y.to(torch.bfloat16)
    floor = held.explained(_error(sums, v * 0, u * 0, mean)).clamp(min=0)
    beaten = explained <= floor
    v[beaten], u[beaten], bias[beaten] = 0, 0, mean[beaten]
    bias[beaten & (floor == 0)] = 0
    tables = {"surrogate_bias": bias, "explained": torch.where(beaten, floor, explained)}
    width = int((u != 0).any(-1).sum(-1).max()) if rank else 0
    if width:
        tables |= {"surrogate_in": v[:, :width], "surrogate_out": u[:, :width]}
    return {name: table.contiguous().cpu() for name, table in tables.items()}


def _error(
    sums: SurrogateSums, v: torch.Tensor, u: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """float64 [E]: held-out error of what is stored, V^T and U^T [E, r, H], b [E, H]."""
    held = {name: tensor[1] for name, tensor in sums.sums.items() if tensor.dim() > 1}
    b = bias.double()
    errors = held["energy"] - 2 * (b * held["y"]).sum(1) + held["weight"] * b.square().sum(1)
    for expert in range(len(v)):
        if not v[expert].any():
            continue
        down, up = v[expert].double(), u[expert].double()  # [r, H]
        errors[expert] -= 2 * ((down @ held["xy"][expert].double()) * up).sum()
        errors[expert] += 2 * (up @ b[expert]) @ (down @ held["x"][expert])
        inner = down @ held["xx"][expert].double() @ down.T
        errors[expert] += ((up @ up.T) * inner).sum()
    return errors
