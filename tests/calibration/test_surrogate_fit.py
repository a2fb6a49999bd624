"""Surrogates fitted from sums, against the tokens themselves."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from sere_sglang.calibration import surrogates
from sere_sglang.calibration.surrogate_fit import RANKS, fit_surrogates, worthwhile_rank
from sere_sglang.calibration.surrogates import BOUND, HELD_EVERY, SurrogateSums

EXPERTS, HIDDEN, TOKENS, SEQUENCE = 4, 48, 6144, 64
Tables = dict[str, torch.Tensor]
EXPERT_BYTES = 48 * 48 * 6.0


@dataclass
class Text:
    """x [T, H], y [E, T, H], routed bool [T, E]."""

    x: torch.Tensor
    y: torch.Tensor
    routed: torch.Tensor

    @property
    def held(self) -> torch.Tensor:
        return (torch.arange(len(self.x)) // SEQUENCE) % HELD_EVERY == HELD_EVERY - 1

    def sums(self, block: int = TOKENS) -> SurrogateSums:
        sums = SurrogateSums(EXPERTS, HIDDEN, SEQUENCE)
        for start in range(0, len(self.x), block):
            part = slice(start, start + block)
            sums.update(self.x[part], self.y[:, part], self.routed[part], start)
        return sums

    def weights(self, expert: int) -> torch.Tensor:
        """float64 [T], as when all tokens are one block."""
        energy = self.y[expert].double().square().sum(1)
        sent = self.routed[:, expert]
        usual = energy[sent].pow(0.25).mean().pow(4)
        return (BOUND * usual / energy).clamp(max=1) * sent

    def explained(self, expert: int, stand_in: torch.Tensor) -> float:
        """Held-out share, by the definition. stand_in: [T, H]."""
        weight = self.weights(expert) * self.held
        y = self.y[expert].double()
        error = (weight[:, None] * (y - stand_in).square()).sum()
        return (1 - error / (weight[:, None] * y.square()).sum()).item()


def a_text(seed: int = 0, noise: float = 0.0, rank: int = 3) -> Text:
    """Experts that are affine maps of known rank, with noise."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=g) * torch.rand(HIDDEN, generator=g) + 0.3
    down = torch.randn(EXPERTS, HIDDEN, rank, generator=g)
    up = torch.randn(EXPERTS, rank, HIDDEN, generator=g)
    y = x @ down @ up / HIDDEN + 0.2 * torch.randn(EXPERTS, 1, HIDDEN, generator=g)
    y = y + noise * torch.randn(EXPERTS, TOKENS, HIDDEN, generator=g)
    return Text(x, y, torch.rand(TOKENS, EXPERTS, generator=g) < 0.4)


def stand_ins(tables: Tables, x: torch.Tensor) -> torch.Tensor:
    """[E, T, H] float64: what a server adds for each expert."""
    result = tables["surrogate_bias"].double()[:, None, :].repeat(1, len(x), 1)
    if "surrogate_in" in tables:
        down, up = tables["surrogate_in"].double(), tables["surrogate_out"].double()
        result += torch.einsum("th,erh,erk->etk", x.double(), down, up)
    return result


def fitted(text: Text, rank: int | None, ranks: tuple[int, ...] = (1, 3, 4, 8)) -> Tables:
    return fit_surrogates(text.sums(), ranks, rank, EXPERT_BYTES)


def test_a_map_of_known_rank_is_found() -> None:
    text = a_text()
    tables = fitted(text, 3)
    best_other, mean, one, three, four, eight, stored = tables["surrogate_explained"]
    assert tables["surrogate_in"].shape == tables["surrogate_out"].shape == (EXPERTS, 3, HIDDEN)
    assert (one < 0.97).all() and (three > 0.998).all() and (mean < 0.8).all()
    assert (four >= three).all() and (eight >= four).all() and (best_other < 0.9).all()
    assert torch.allclose(stored, three, atol=1e-3)
    y = stand_ins(tables, text.x)
    assert (y - text.y).norm() < 0.05 * text.y.norm()
    energy = [text.y[e, text.routed[:, e]].square().sum(1).mean() for e in range(EXPERTS)]
    assert torch.allclose(tables["expert_energy"], torch.stack(energy), rtol=1e-4)
    assert tables["expert_bytes"].tolist() == [EXPERT_BYTES] * EXPERTS


def test_auto_stops_where_the_map_does() -> None:
    assert fitted(a_text(noise=0.02), None)["surrogate_in"].shape[1] == 3


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_what_is_said_of_held_out_tokens_is_so(noise: float) -> None:
    text = a_text(noise=noise)
    tables = fitted(text, 4)
    y = stand_ins(tables, text.x)
    best_other, mean, *_, stored = tables["surrogate_explained"]
    for e in range(EXPERTS):
        fit = text.weights(e) * ~text.held
        assert text.explained(e, y[e]) == pytest.approx(stored[e].item(), abs=1e-4)
        average = (fit @ text.y[e].double()) / fit.sum()
        assert text.explained(e, average) == pytest.approx(mean[e].item(), abs=1e-4)
        gains = []
        for j in set(range(EXPERTS)) - {e}:
            other = text.y[j].double()
            dot = (fit[:, None] * text.y[e].double() * other).sum()
            energy = (fit[:, None] * other.square()).sum()
            gains.append(((dot.square() / energy).item(), text.explained(e, dot / energy * other)))
        assert max(gains)[1] == pytest.approx(best_other[e].item(), abs=1e-4)


def test_the_subspace_iteration_finds_what_the_whole_matrix_gives() -> None:
    """48 channels and rank 4 take the iteration, rank 8 the matrix itself."""
    sums = a_text(noise=0.3, rank=12).sums()
    few = fit_surrogates(sums, (4,), 4, EXPERT_BYTES)
    whole = fit_surrogates(sums, (4, 8), 4, EXPERT_BYTES)
    explained = "surrogate_explained"
    assert torch.allclose(few[explained][2], whole[explained][2], atol=2e-3)


def test_blocks_change_nothing_but_the_bound_of_the_first_tokens() -> None:
    text = a_text(noise=0.3)
    whole, cut = (text.sums(block).sums for block in (TOKENS, 777))
    assert torch.equal(whole["count"], cut["count"])
    for name in ("xx", "xy", "x", "y", "energy", "cross", "energy_other", "plain_energy"):
        assert torch.allclose(whole[name], cut[name], rtol=1e-3, atol=1e-2), name


def test_massive_tokens_do_not_ruin_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token in 300 whose input and output are huge, each in its own direction."""
    text = a_text(noise=0.1)
    g = torch.Generator().manual_seed(1)
    huge = torch.rand(TOKENS, generator=g) < 1 / 300
    count = int(huge.sum())
    text.x[huge, 5] += 30
    text.y[:, huge] = 300 * torch.randn(EXPERTS, count, HIDDEN, generator=g)
    ordinary = Text(text.x[~huge], text.y[:, ~huge], text.routed[~huge])

    def on_ordinary(tables: Tables, e: int) -> float:
        chosen = text.held & ~huge & text.routed[:, e]
        y = text.y[e, chosen].double()
        error = (stand_ins(tables, text.x[chosen])[e] - y).square().sum()
        return (1 - error / y.square().sum()).item()

    robust = fitted(text, 4)
    monkeypatch.setattr(surrogates, "BOUND", 1e30)
    monkeypatch.setattr("sere_sglang.calibration.surrogate_fit.RIDGES", (0.003,))
    plain, undisturbed = fitted(text, 4), fitted(ordinary, 4)
    mean, stored = robust["surrogate_explained"][[1, -1]]
    for e in range(EXPERTS):
        shares = [on_ordinary(tables, e) for tables in (plain, robust, undisturbed)]
        assert shares[0] + 0.2 < shares[1] and shares[2] - 0.3 < shares[1], shares
        assert stored[e] >= mean[e]


def test_an_expert_falls_back_where_held_out_tokens_say_so() -> None:
    """Expert 0 is noise around a mean, 1 noise around 0, nobody uses 2, 3 can be learnt."""
    text = a_text()
    noise = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))
    text.y[:2] = noise
    text.y[0] += 0.5
    text.routed[:, 2] = False
    tables = fitted(text, 4)
    linear = tables["surrogate_out"].any(2).any(1)
    constant = tables["surrogate_bias"].any(1)
    assert linear.tolist() == [False, False, False, True]
    assert constant.tolist() == [True, False, False, True]
    stored = tables["surrogate_explained"][-1]
    assert stored[1] == stored[2] == 0 and 0.1 < stored[0] < 0.3 and stored[3] > 0.99
    assert tables["surrogate_explained"].isfinite().all()


def test_without_any_map_there_are_no_factors() -> None:
    text = a_text()
    text.y = torch.randn(EXPERTS, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3)) + 0.5
    tables = fitted(text, None)
    assert "surrogate_in" not in tables and "surrogate_out" not in tables
    assert tables["surrogate_bias"].any(1).all()


def test_outputs_that_are_zero_throughout() -> None:
    text = a_text()
    text.y[:] = 0
    tables = fitted(text, 4)
    assert not tables["surrogate_bias"].any() and "surrogate_in" not in tables
    assert (tables["surrogate_explained"] == 0).all()


@pytest.mark.parametrize(
    ("explained", "rank_share", "rank"),
    [
        ((0.1, 0.5, 0.6, 0.7, 0.8, 0.9), 1e-4, 64),  # of a wide expert all are cheap
        ((0.1, 0.5, 0.52, 0.9, 0.95, 0.99), 0.02, 4),
        ((0.1, 0.11, 0.12, 0.13, 0.14, 0.15), 0.02, 0),
        ((0.1, 0.9, 0.99, 1.0, 1.0, 1.0), 0.01, 16),
    ],
)
def test_the_rank_is_worth_its_bytes(
    explained: tuple[float, ...], rank_share: float, rank: int
) -> None:
    assert worthwhile_rank(explained, RANKS, rank_share) == rank
