"""Tables of times: fitted to noise, monotone everywhere; the routings they are measured with."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_sglang.runtime.probe import collect, columns, routing
from sere_sglang.schedule.cost import MoeCost
from sere_sglang.schedule.layer_cost import BandwidthCost, LayerShape, MeasuredCost, isotonic

SHAPE = LayerShape(num_experts=64, top_k=8, hidden_size=32, intermediate_size=16)
ROWS = (1, 4, 16, 64)


def truth(rows: float, active: float) -> float:
    """Reads or multiplies, and what a call costs anyway."""
    return 0.05 + max(0.1 * active, 0.02 * rows)


def table(noise: float = 0.0, seed: int = 0, skip: float = 0.0) -> MeasuredCost:
    """Of `truth`, where the rows can have so many experts; a share of the cells left out."""
    random = np.random.default_rng(seed)
    active = columns(SHAPE, ROWS)
    ms = np.full((len(ROWS), len(active)), np.nan)
    for r, c in itertools.product(range(len(ROWS)), range(len(active))):
        if active[c] <= SHAPE.most_active(ROWS[r]) and (c == 0 or random.random() >= skip):
            ms[r, c] = truth(ROWS[r], active[c]) * np.exp(noise * random.standard_normal())
    return MeasuredCost.fit(SHAPE, ROWS, active, ms)


def of(cost: MeasuredCost | BandwidthCost, rows: float, active: float | np.ndarray) -> np.ndarray:
    return np.interp(active, *cost.curve(rows))


@pytest.mark.parametrize(
    ("rows", "active"), [(1, 8), (4, 8), (4, 32), (10, 20), (30, 50), (64, 64), (64, 17), (200, 64)]
)
def test_a_clean_table_says_what_was_measured(rows: int, active: float) -> None:
    assert float(of(table(), rows, active)) == pytest.approx(truth(rows, active), rel=0.08)


def test_beyond_the_table() -> None:
    cost = table()
    assert of(cost, 1, 8.0) == of(cost, 1, 64.0), "one row has 8 experts at most"
    assert of(cost, 64, 64.0) == of(cost, 64, 500.0), "the layer has 64"
    assert of(cost, 64, 2.0) < of(cost, 64, 8.0)
    assert of(cost, 64, 2.0) >= of(cost, 64, 8.0) * 2 / 8, "no cheaper than in proportion"
    assert of(cost, 6400, 64.0) > of(cost, 640, 64.0) > of(cost, 64, 64.0)


@settings(max_examples=60, deadline=None)
@given(
    noise=st.floats(0, 1.5),
    seed=st.integers(0, 10_000),
    skip=st.floats(0, 0.9),
    rows=st.lists(st.floats(1, 2000), min_size=2, max_size=6),
)
def test_any_table_is_monotone(noise: float, seed: int, skip: float, rows: list[float]) -> None:
    """In rows and in active experts, on the grid, between its lines and beyond them."""
    cost = table(noise, seed, skip)
    active = np.linspace(0, 64, 40)
    times = np.array([of(cost, n, active) for n in sorted(rows)])
    assert np.isfinite(times).all() and (times >= 0).all()
    for axis in (0, 1):
        assert (np.diff(times, axis=axis) >= -1e-9 * times.max()).all()


def test_isotonic_is_the_closest_table() -> None:
    """Against least squares by projected gradient, on logarithms."""
    random = np.random.default_rng(5)
    ms = np.exp(random.standard_normal((4, 5)))
    ms[0, 3:] = np.nan
    fitted = isotonic(ms)
    assert (np.isnan(fitted) == np.isnan(ms)).all()
    there = np.isfinite(ms)
    error = np.sum((np.log(fitted) - np.log(ms))[there] ** 2)
    for _ in range(300):  # no monotone table nearby is closer
        other = np.log(fitted) + 0.05 * random.standard_normal(ms.shape)
        for axis in (0, 1, 0, 1):
            other = np.maximum.accumulate(np.where(there, other, -np.inf), axis=axis)
        assert np.sum((other - np.log(ms))[there] ** 2) >= error - 1e-6
    monotone = np.sort(np.sort(np.exp(random.standard_normal((4, 5))), axis=0), axis=1)
    assert isotonic(monotone) == pytest.approx(monotone)


def test_shapes_add_up() -> None:
    small, large = BandwidthCost(SHAPE, 0.1, 0.001), BandwidthCost(SHAPE, 0.3, 0.001)
    cost = MoeCost(((small, (0, 1, 2)), (large, (3,))))
    assert cost.num_layers == 4
    assert cost.moe_ms(8, 4 * 30.0) == pytest.approx(3 * 3.0 + 9.0)
    few, many = cost.moe_ms(8, np.array([4 * 10.0, 4 * 50.0]))
    assert few == pytest.approx(3 * 1.0 + 3.0) and many == pytest.approx(3 * 5.0 + 15.0)


def test_layers_of_other_stages_cost_what_most_do() -> None:
    small, large = BandwidthCost(SHAPE, 0.1, 0.001), BandwidthCost(SHAPE, 0.3, 0.001)
    cost = MoeCost(((large, (0,)), (small, (1, 2))), source="measured")
    whole = cost.covering(range(6))
    assert [ids for _, ids in whole.layers] == [(0,), (1, 2, 3, 4, 5)]
    assert whole.source == "measured" and cost.covering(range(3)) is cost
    assert cost.moe_ms(8, 3 * 10.0) < whole.moe_ms(8, 6 * 10.0)


@pytest.mark.parametrize(("experts", "top_k"), [(64, 8), (8, 2), (48, 6), (256, 8), (4, 4), (5, 4)])
def test_columns_reach_from_top_k_to_all(experts: int, top_k: int) -> None:
    found = columns(LayerShape(experts, top_k, 1, 1), ROWS)
    assert found[0] == top_k and found[-1] == experts and list(found) == sorted(set(found))
    assert len(found) <= 8


@pytest.mark.parametrize("ranks", [1, 4])
def test_routing_activates_what_it_says(ranks: int) -> None:
    shape = LayerShape(64, 8, 1, 1, share=1 / ranks)
    random = np.random.default_rng(0)
    seen = set()
    for rows, active in ((1, 8), (4, 8), (4, 32), (16, 40), (64, 64), (64, 11)):
        ids = routing(random, shape, rows, active)
        assert ids.shape == (rows, 8) and ids.dtype == np.int32
        assert len(np.unique(ids)) == active and ids.min() >= 0 and ids.max() < 64
        assert all(len(set(row)) == 8 for row in ids.tolist())
        counts = np.bincount(ids.ravel(), minlength=64)
        assert counts.max() - counts[counts > 0].min() <= 1, "alike in load"
        per_rank = np.bincount(np.unique(ids) // (64 // ranks), minlength=ranks)
        assert per_rank.max() - per_rank.min() <= 1, "spread over the ranks"
        seen.add(tuple(sorted(set(routing(random, shape, rows, active).ravel().tolist()))))
    assert len(seen) > 3, "other experts each time"


class Clock:
    """Time passes when a sample is taken."""

    def __init__(self, seconds_per_expert: float) -> None:
        self.now, self.each = 0.0, seconds_per_expert

    def sample(self, rows: int, active: int) -> float:
        self.now += self.each * active
        return 1000 * self.each * active


POINTS = [(r, a) for r in ROWS for a in columns(SHAPE, ROWS) if a <= SHAPE.most_active(r)]


def test_with_time_every_point_is_sampled_alike() -> None:
    clock = Clock(1e-6)
    times = collect(clock.sample, POINTS, 1.0, lambda: clock.now)
    assert set(times) == set(POINTS) and len({len(t) for t in times.values()}) == 1
    assert clock.now < 0.5, "and then it stops"


def test_large_layers_stay_within_the_budget() -> None:
    clock = Clock(0.01)  # all 64 experts take 0.64 s
    times = collect(clock.sample, POINTS, 1.5, lambda: clock.now)
    assert clock.now <= 1.5
    assert {8, 64} <= {a for _, a in times} or max(a for _, a in times) >= 32
    one = Clock(1.0)  # not even the first point fits
    assert len(collect(one.sample, POINTS, 1.5, lambda: one.now)) == 1
