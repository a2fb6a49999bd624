"""Weights and rules from one layer's output: layers whose best is known, and all by brute force."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from sere_sglang import apply_rule
from sere_sglang.calibration.rule_fit import BATCHES, COHERENT, GRID, STRENGTHS, fit_rules
from sere_sglang.calibration.token_sample import GROUP, TokenSample

E, H, K, TOKENS = 16, 12, 4, 6 * GROUP
Outputs = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass
class Layer:
    """outputs: [E, n, H] of rows [n, H]."""

    outputs: Outputs
    scores: bool = True
    scale: float = 1.0

    def sample(self, tokens: int = TOKENS) -> TokenSample:
        g = torch.Generator().manual_seed(2)
        rows, gate = torch.randn(tokens, H, generator=g), torch.randn(E, H, generator=g)
        scores = (rows @ gate.T / H**0.5 * 2).softmax(-1)
        weights, ids = scores.topk(K)
        sample = TokenSample(tokens, None)
        given = scores if self.scores else None
        sample.add(0, rows, ids, self.scale * weights / weights.sum(1, keepdim=True), given)
        return sample

    def fit(self, surrogates: tuple[torch.Tensor, ...] | None = None) -> dict[str, torch.Tensor]:
        return fit_rules(self.sample(), self.outputs, GROUP, torch.eye(E), surrogates)  # type: ignore[arg-type]


def of_maps(*, alike: float) -> Outputs:
    """Linear experts, of whose maps a share is that of all."""
    g = torch.Generator().manual_seed(1)
    own, common = torch.randn(E, H, H, generator=g), torch.randn(1, H, H, generator=g)
    maps = ((1 - alike) * own + alike * common) / H**0.5
    return lambda rows: torch.einsum("eoi,ni->eno", maps, rows)


def _apart(rows: torch.Tensor) -> torch.Tensor:
    """Every expert writes to channels of its own."""
    return torch.einsum("ef,ni->enfi", torch.eye(E), rows).flatten(2)


def weights_of(tables: dict[str, torch.Tensor]) -> list[float]:
    return tables["energy_weights"].tolist()


def test_experts_that_have_nothing_in_common_are_not_filled() -> None:
    tables = Layer(_apart).fit()
    a, gamma, _ = weights_of(tables)
    assert a <= 0.125 and 0.0 < gamma < 1.0, "and what is left is not stretched to the row's sum"
    some = tables["error_active"] < 0.9
    for rule in ("piggyback", "similarity", "budget"):
        assert (tables["error_energy"] < tables[f"error_{rule}"])[some].all()


def test_experts_that_are_all_the_same_keep_the_rows_sum() -> None:
    tables = Layer(of_maps(alike=1.0)).fit()
    assert weights_of(tables)[1] == 1.0
    for rule in ("energy", "piggyback", "similarity"):
        assert tables[f"error_{rule}"].max() < 1e-6, rule


def test_weights_do_not_depend_on_the_scale_of_routing_weights() -> None:
    one, other = (Layer(of_maps(alike=0.5), scale=scale).fit() for scale in (1.0, 40.0))
    assert weights_of(one) == weights_of(other)
    for name, table in one.items():
        assert torch.allclose(table.double(), other[name].double(), rtol=1e-3), name


def test_the_weights_are_those_that_brute_force_finds() -> None:
    layer = Layer(of_maps(alike=0.5))
    parts, tables = layer.sample().parts, layer.fit()
    y = layer.outputs(parts["rows"])
    # One cell, of which everything is computed by the rule itself: batches of 32, its first S.
    cell = tables["error_batch"].tolist().index(32)
    at = torch.arange(TOKENS)[:, None]

    def error(a: float, gamma: float, groups: range) -> float:
        missed = short = total = 0.0
        for group in groups:
            rows = slice(group * GROUP, (group + 1) * GROUP)
            ids, weights, scores = (parts[name][rows] for name in ("ids", "weights", "scores"))
            count = len(set(ids[:, 0].tolist()))  # slots are sorted: S = 1
            routed = apply_rule(
                "energy", ids, weights, scores=scores, loss=_loss(ids, weights, count),
                fill_weight=a, renormalize=gamma,
            )  # fmt: skip
            exact, now = (
                (y[i.long(), at[rows]] * w[:, :, None]).sum(1)
                for i, w in ((ids, weights), (routed.ids, routed.weights))
            )
            missed += float((exact - now).square().sum())
            short += float(((exact - now) * exact).sum())
            total += float(exact.square().sum())
        return missed / total + COHERENT * (short / total) ** 2

    a, gamma, _ = weights_of(tables)
    assert tables["error_energy"][cell] == pytest.approx(error(a, gamma, range(1, 6, 2)), rel=1e-3)
    # All cells together are a compromise, which in a layer like this is near each one's best.
    best = min(error(a, gamma, range(0, 6, 2)) for a in GRID for gamma in GRID)
    assert error(a, gamma, range(0, 6, 2)) <= 1.25 * best
    assert 0 < a < 1


def _loss(ids: torch.Tensor, weights: torch.Tensor, count: int) -> float:
    """With which `count` experts stay."""
    low, high = 0.0, 1.0
    for _ in range(60):
        loss = (low + high) / 2
        routed = apply_rule("energy", ids, weights, similarity=torch.eye(E), loss=loss)
        low, high = (loss, high) if int(routed.active.sum()) > count else (low, loss)
    return high


@pytest.mark.parametrize(("times", "strength"), [(1.0, 1.0), (2.0, 0.5), (0.5, 1.0), (-1.0, 0.0)])
def test_the_strength_of_surrogates_of_full_rank(times: float, strength: float) -> None:
    outputs = of_maps(alike=0.2)
    eye = torch.eye(H)
    maps = outputs(eye).mT  # [E, out, in]
    inward, outward = eye.expand(E, H, H), maps.mT * times
    layer = Layer(outputs)
    tables = layer.fit((inward, outward, torch.zeros(E, H)))
    assert weights_of(tables)[2] == pytest.approx(strength) and strength in STRENGTHS
    if strength * times == 1.0:
        assert tables["error_surrogates"].max() < 1e-6
    else:
        assert tables["error_surrogates"].max() > 1e-3
    assert weights_of(tables)[:2] == weights_of(layer.fit())[:2], "which surrogates do not change"


def test_a_router_without_scores_is_measured_under_what_it_can_have() -> None:
    tables = Layer(of_maps(alike=0.5), scores=False).fit()
    assert {"error_similarity", "error_energy"} <= tables.keys()
    assert not {"error_piggyback", "error_budget"} & tables.keys()
    assert weights_of(tables)[0] == 0.0, "nothing is known to fill lost slots with"


def test_cells_say_how_much_is_loaded() -> None:
    tables = Layer(of_maps(alike=0.5)).fit()
    rows, active = tables["error_batch"], tables["error_active"]
    assert set(rows.tolist()) == set(BATCHES) and len(rows) == len(active)
    assert ((active > 0) & (active < 1)).all()
    for batch in BATCHES:
        own = rows == batch
        assert active[own].tolist() == sorted(active[own].tolist())
        assert tables["error_energy"][own].tolist() == sorted(
            tables["error_energy"][own].tolist(), reverse=True
        )


@pytest.mark.parametrize("tokens", [0, GROUP, 2 * GROUP - 1])
def test_too_few_tokens_to_choose_and_to_judge_by(tokens: int) -> None:
    layer = Layer(of_maps(alike=0.0))
    sample = layer.sample(tokens) if tokens else TokenSample(0, None)
    assert fit_rules(sample, layer.outputs, GROUP, torch.eye(E), None) == {}
