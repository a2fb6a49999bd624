"""Which rule errs least in one layer, and with which weights ``energy`` does.

Batches are made of held-out tokens. In every batch each rule loads exactly as many experts as the
tokens' S best are, for a few S: SERE and OEA at that S, XShare at that B, ``energy`` at the loss
that leaves so many. What a rule makes of the layer's output is compared with exact routing's; the
whole model never runs. Half of the batches choose the weights, the other half judges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sere_sglang.calibration.surrogates import BOUND
from sere_sglang.calibration.token_sample import GROUP, TokenSample
from sere_sglang.ops.rules import apply_rule
from sere_sglang.ops.rules_call import Routed
from sere_sglang.profile.rule_errors import CANDIDATES, Candidate

BATCHES = (8, 32)
"""Rows of a batch; each divides `GROUP`."""
GRID = tuple(i / 8 for i in range(9))
"""Values that are tried for a, and for gamma."""
STRENGTHS = tuple(i / 20 for i in range(21))
"""... and for what surrogates are multiplied by."""

COHERENT = 30.0
"""How much more it costs to lose length than the same error in another direction; see `_Sums`.
Chosen by the KL of two models, docs/quality.md."""

_DEGREES = (1 / 6, 2 / 6, 3 / 6, 4 / 6)  # S, as shares of K
_ENERGY, _WITH_SURROGATES = CANDIDATES[3:]
_TINY = 1e-30


Surrogates = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""V^T and U^T ``[E, r, H]`` and b ``[E, H]``."""


def fit_rules(
    sample: TokenSample,
    outputs: Callable[[torch.Tensor], torch.Tensor],
    at_once: int,
    similarity: torch.Tensor,
    surrogates: Surrogates | None,
) -> dict[str, torch.Tensor]:
    """The tables of one layer (`profile.rule_errors`), on the CPU; none where the sample is too
    small to choose and to judge by, or a token has one expert only.

    Args:
        outputs: ``[E, n, H]`` of rows ``[n, H]``, every expert's output. Always called alike, so
            that ranks which call it together do.
        at_once: rows that it may be called with.
        similarity, surrogates: what a server would have. ``[E, E]``; None where there are none.
    """
    groups = len(sample) // GROUP
    if groups < 2 or sample.parts["ids"].shape[1] < 2:
        return {}
    trial = _Trial(sample, similarity, surrogates)
    for group in range(groups):
        rows = sample.parts["rows"][group * GROUP : (group + 1) * GROUP]
        parts = [outputs(part) for part in rows.split(min(at_once, GROUP))]
        trial.run(group, torch.cat(parts, dim=1).float())
    return trial.tables()


@dataclass
class _Sums:
    """What a rule did to an output y of the layer, which became y': ``[n, values to choose from]``.

    squared: |y - y'|^2. short: (y - y') . y. Errors in all directions average out over layers and
    tokens, but what every token's output is too short by, they lose together: a layer's error is
    the mean of `squared` and, `COHERENT` times, the square of the mean of `short`, as shares of
    the mean of |y|^2. Without the second, least squares shrinks what it does not know, which is
    not what the model's own output likes best (docs/quality.md).
    """

    squared: torch.Tensor
    short: torch.Tensor

    def __post_init__(self) -> None:
        for name in ("squared", "short"):
            values = getattr(self, name).double().cpu()
            setattr(self, name, values.reshape(len(values), -1))


@dataclass
class _Cell:
    """Of one batch size and S: what each candidate did, by batch, and how many experts exact
    routing and the rules loaded in all batches."""

    rows: int
    sums: dict[Candidate, list[_Sums]] = field(default_factory=dict)
    used: int = 0
    loaded: int = 0

    def note(self, candidate: Candidate, sums: _Sums) -> None:
        self.sums.setdefault(candidate, []).append(sums)

    def error(
        self, candidate: Candidate, weight: torch.Tensor, energy: torch.Tensor
    ) -> torch.Tensor:
        """[values]: over tokens of this `weight` [n], whose outputs have `energy` [n]."""
        squared, short = (
            weight @ torch.cat([getattr(sums, name) for sums in self.sums[candidate]])
            for name in ("squared", "short")
        )
        whole = (weight @ energy).clamp(min=_TINY)
        return (squared / whole + COHERENT * (short / whole).square()).clamp(min=0)


class _Trial:
    def __init__(
        self, sample: TokenSample, similarity: torch.Tensor, surrogates: Surrogates | None
    ) -> None:
        self.parts = sample.parts
        weights = sample.parts["weights"]
        # No rule looks at their scale; losses are shares of 1.
        self.weights = weights / weights.sum(dim=1).max().clamp(min=_TINY)
        self.surrogates = surrogates
        self.similarity = similarity.float().cpu()
        top_k = weights.shape[1]
        self.degrees = sorted({min(max(1, round(top_k * d)), top_k - 1) for d in _DEGREES})
        self.cells = {(rows, s): _Cell(rows) for rows in BATCHES for s in self.degrees}
        self.energy: list[torch.Tensor] = []  # of the layer's exact output, [n]

    def run(self, group: int, y: torch.Tensor) -> None:
        """y: float32 [E, GROUP, H], every expert's output for the tokens of the group."""
        chosen = slice(group * GROUP, (group + 1) * GROUP)
        tokens = {name: part[chosen] for name, part in self.parts.items() if name != "keys"}
        tokens["weights"] = self.weights[chosen]
        imitated = self._imitated(tokens["rows"], tokens["ids"])
        own = _gathered(y, tokens["ids"])
        exact = (own * tokens["weights"][:, :, None]).sum(1)
        self.energy.append(exact.square().sum(1).double().cpu())
        for rows in BATCHES:
            for start in range(0, GROUP, rows):
                part = slice(start, start + rows)
                batch = _Batch(
                    {name: t[part].cpu() for name, t in tokens.items() if name != "rows"},
                    y[:, part], exact[part], None if imitated is None else imitated[part],
                    self.similarity,
                )  # fmt: skip
                for s in self.degrees:
                    batch.at(s, self.cells[rows, s])

    def _imitated(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor | None:
        """float32 [n, K, H]: what surrogates make of the input for every slot's expert."""
        if self.surrogates is None:
            return None
        inward, outward, bias = (table.to(x.device) for table in self.surrogates)
        x, made = x.float(), []
        for slot in ids.clamp(min=0).long().T:
            inner = torch.einsum("nrh,nh->nr", inward[slot].float(), x)
            made.append(torch.einsum("nr,nrh->nh", inner, outward[slot].float()) + bias[slot])
        return torch.stack(made, 1)

    def tables(self) -> dict[str, torch.Tensor]:
        energy = torch.cat(self.energy)
        # As in SurrogateSums: a few tokens with massive activations do not decide.
        usual = energy.pow(0.25).mean().pow(4)
        influence = (BOUND * usual / energy.clamp(min=_TINY)).clamp(max=1)
        judges = torch.arange(len(energy)) // GROUP % 2 == 1
        found: dict[Candidate, tuple[torch.Tensor, torch.Tensor]] = {}  # [C, values] each
        for candidate in self.cells[BATCHES[0], self.degrees[0]].sums:
            chooses, judged = (
                torch.stack(
                    [
                        cell.error(candidate, influence * half, energy)
                        for cell in self.cells.values()
                    ]
                )
                for half in (~judges, judges)
            )
            found[candidate] = chooses, judged
        places = {candidate: _least(chooses) for candidate, (chooses, _) in found.items()}
        a, gamma = divmod(places[_ENERGY], len(GRID))
        strength = STRENGTHS[places.get(_WITH_SURROGATES, -1)]
        active = [cell.loaded / cell.used for cell in self.cells.values()]
        return {
            "error_batch": torch.tensor([cell.rows for cell in self.cells.values()]),
            "error_active": torch.tensor(active, dtype=torch.float32),
            "energy_weights": torch.tensor([GRID[a], GRID[gamma], strength]),
            **{
                candidate.table: judged[:, places[candidate]].float()
                for candidate, (_, judged) in found.items()
            },
        }


def _least(errors: torch.Tensor) -> int:
    """Of [C, values] the value with the least geometric mean over cells."""
    return int(errors.clamp(min=1e-12).log().mean(0).argmin())


@dataclass
class _Batch:
    """parts: on the CPU. y: [E, n, H]; exact [n, H]; imitated [n, K, H] on the layer's device."""

    parts: dict[str, torch.Tensor]
    y: torch.Tensor
    exact: torch.Tensor
    imitated: torch.Tensor | None
    similarity: torch.Tensor

    def at(self, s: int, cell: _Cell) -> None:
        ids, weights, scores = (self.parts.get(name) for name in ("ids", "weights", "scores"))
        assert ids is not None and weights is not None
        order = weights.argsort(dim=1, descending=True, stable=True)
        used, sure, first = (_experts(ids.gather(1, order[:, :k])) for k in (ids.shape[1], s, 1))
        cell.used, cell.loaded = cell.used + len(used), cell.loaded + len(sure)
        loss = _loss_that_leaves(len(sure), used, first, ids, weights, len(self.similarity))

        def routed(rule: str, **options: Any) -> Routed:
            given = {"scores": scores, "similarity": self.similarity, **options}
            return apply_rule(rule, ids, weights, **given)

        cell.note(CANDIDATES[0], self._sums(routed("similarity", primary_k=s)))
        if scores is not None:
            cell.note(CANDIDATES[1], self._sums(routed("piggyback", k0=s)))
            cell.note(CANDIDATES[2], self._sums(routed("budget", budget=len(sure))))
        kept = routed("energy", loss=loss)
        filled = kept if scores is None else routed("energy", loss=loss, fill_weight=1.0)
        cell.note(_ENERGY, self._energy_sums(kept, filled, weights, scores is not None))
        if self.imitated is not None:
            cell.note(_WITH_SURROGATES, self._surrogate_sums(kept, ids))

    def _output(self, routed: Routed) -> torch.Tensor:
        weights = routed.weights.to(self.y.device)
        return (_gathered(self.y, routed.ids) * weights[:, :, None]).sum(1)

    def _sums(self, routed: Routed) -> _Sums:
        missing = self.exact - self._output(routed)
        return _Sums(missing.square().sum(1), (missing * self.exact).sum(1))

    def _energy_sums(
        self, kept: Routed, filled: Routed, weights: torch.Tensor, fills: bool
    ) -> _Sums:
        """Of [n, a, gamma]: |y - rho^gamma (k + a f)|^2 from products of y, k (what is kept) and f
        (what lost slots are filled with, in full). Without scores f is 0 and a too."""
        y, k = self.exact, self._output(kept)
        f = self._output(filled) - k
        yk, yf, kk, kf, ff, yy = (
            (one * other).sum(1).double().cpu()
            for one, other in ((y, k), (y, f), (k, k), (k, f), (f, f), (y, y))
        )
        before, now, more = (t.sum(1).double() for t in (weights, kept.weights, filled.weights))
        a = torch.tensor(GRID if fills else (0.0,), dtype=torch.float64)
        after = now[:, None] + a * (more - now)[:, None]  # [n, a]
        ratio = torch.where(after > 0, before[:, None] / after.clamp(min=_TINY), 1.0)
        assert kept.lost is not None
        ratio = torch.where((kept.lost > 0).any(1)[:, None], ratio, 1.0)
        factor = ratio[:, :, None].pow(torch.tensor(GRID, dtype=torch.float64))  # [n, a, gamma]
        along = yk[:, None] + a * yf[:, None]
        square = kk[:, None] + 2 * a * kf[:, None] + a.square() * ff[:, None]
        yy, along, square = yy[:, None, None], factor * along[..., None], square[..., None]
        return _Sums(yy - 2 * along + factor.square() * square, yy - along)

    def _surrogate_sums(self, kept: Routed, ids: torch.Tensor) -> _Sums:
        """Of [n, strength]."""
        assert kept.lost is not None and self.imitated is not None
        lost = kept.lost.gather(1, ids.clamp(min=0).long()).to(self.y.device)
        y, missing = self.exact, self.exact - self._output(kept)
        made = (self.imitated * lost[:, :, None]).sum(1)
        pairs = (missing, missing), (missing, made), (made, made), (missing, y), (made, y)
        mm, mi, ii, my, iy = ((one * other).sum(1).double().cpu()[:, None] for one, other in pairs)
        strength = torch.tensor(STRENGTHS, dtype=torch.float64)
        return _Sums(mm - 2 * strength * mi + strength.square() * ii, my - strength * iy)


def _gathered(y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[n, K, H] of y [E, n, H]; anything where an id is no expert, whose weight is 0."""
    at = ids.clamp(min=0).long().to(y.device)
    return y[at, torch.arange(len(at), device=y.device)[:, None]]


def _experts(ids: torch.Tensor) -> set[int]:
    return set(ids.flatten().tolist()) - {-1}


def _loss_that_leaves(
    count: int, used: set[int], first: set[int], ids: torch.Tensor, weights: torch.Tensor, size: int
) -> float:
    """The loss with which ``energy`` loads `count` experts: halfway between that of the last one
    to be dropped and that of the next."""
    energy = torch.zeros(size, dtype=torch.float64)
    energy.scatter_add_(0, ids.clamp(min=0).long().flatten(), weights.double().square().flatten())
    droppable = energy[sorted(used - first)].sort().values / len(ids)
    spent = [0.0, *droppable.cumsum(0).tolist()]
    dropped = len(used) - count
    beyond = spent[dropped + 1] if dropped + 1 < len(spent) else 2 * spent[dropped]
    return min(1.0, (spent[dropped] + beyond) / 2)
