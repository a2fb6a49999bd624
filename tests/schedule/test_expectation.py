"""The closed form against drawing batches and re-routing them with the reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sere_sglang.ops import reroute
from sere_sglang.schedule import expectation as module
from sere_sglang.schedule.expectation import (
    Expectation,
    LayerStatistics,
    expect,
)
from sere_sglang.schedule.point import OFF, OperatingPoint

E, K = 32, 4
THRESHOLDS = (0.0, 0.5)
ENERGY = np.array([0.5, 0.25, 0.15, 0.1])


@pytest.fixture(scope="module")
def layer() -> LayerStatistics:
    rng = np.random.default_rng(3)
    similarity = rng.random((E, E))
    similarity = (similarity + similarity.T) / 2
    np.fill_diagonal(similarity, 1.0)
    return LayerStatistics(similarity.astype(np.float32), _by_rank(rng), ENERGY)


def _router(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(E) * 0.7


def _draw(rng: np.random.Generator, scores: np.ndarray, rows: int) -> np.ndarray:
    """Top-k with Gumbel noise: each row draws K distinct experts, the likeliest first."""
    return np.argsort(-(scores + rng.gumbel(size=(rows, E))), axis=1)[:, :K]


def _by_rank(rng: np.random.Generator) -> np.ndarray:
    ids = _draw(rng, _router(np.random.default_rng(9)), 40_000)
    return np.stack([np.bincount(ids[:, k], minlength=E) / len(ids) for k in range(K)])


@pytest.fixture(scope="module")
def expectation(layer: LayerStatistics) -> Expectation:
    return expect({0: layer, 1: layer}, THRESHOLDS)


@pytest.mark.parametrize("rows", [1, 3, 8, 32, 128])
@pytest.mark.parametrize("s", [1, 2, 3])
@pytest.mark.parametrize("rho", THRESHOLDS)
def test_agrees_with_drawn_batches(
    layer: LayerStatistics, expectation: Expectation, rows: int, s: int, rho: float
) -> None:
    rng = np.random.default_rng(rows)
    scores = _router(np.random.default_rng(9))
    similarity = torch.from_numpy(layer.similarity)
    plain, active, loss = [], [], []
    for _ in range(200):
        ids = _draw(rng, scores, rows)
        after = reroute(
            torch.from_numpy(ids).int(), similarity, primary_k=s, threshold=rho, impl="torch"
        ).numpy()
        plain.append(len(np.unique(ids)))
        active.append(len(np.unique(after)))
        error = np.sqrt(ENERGY) * (1.0 - layer.similarity[ids, after]) * (ids != after)
        alone, together = (error**2).sum(axis=1), error.sum(axis=1) ** 2
        loss.append(float((alone + (together - alone) / 3).mean()))
    expected_active, expected_loss = expectation.effect(rows, OperatingPoint(True, s, rho))
    assert expectation.plain_active(rows) == pytest.approx(2 * np.mean(plain), rel=0.06)
    assert expected_active == pytest.approx(2 * np.mean(active), rel=0.12)
    assert expected_loss == pytest.approx(np.mean(loss), rel=0.25, abs=0.002)


def test_far_neighbours_count_by_their_mean(
    layer: LayerStatistics, expectation: Expectation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the nearest ones, which large models have more than enough of."""
    monkeypatch.setattr(module, "_NEAREST", 20)
    short = expect({0: layer, 1: layer}, THRESHOLDS)
    for whole, ours in ((expectation.active, short.active), (expectation.loss, short.loss)):
        np.testing.assert_allclose(ours, whole, rtol=0.1, atol=0.002)
    assert not np.array_equal(short.loss, expectation.loss)


def test_more_rows_make_better_substitutes(expectation: Expectation) -> None:
    for i, rho in enumerate(p.threshold for p in expectation.points):
        if rho == 0.0:
            assert (np.diff(expectation.loss[..., i], axis=0) <= 1e-9).all()
    assert (np.diff(expectation.plain, axis=0) >= 0).all()


def test_larger_s_skips_less_and_loses_less(expectation: Expectation) -> None:
    exact = [i for i, p in enumerate(expectation.points) if p.threshold == 0.0]
    for fewer, more in itertools.pairwise(exact):
        assert (expectation.active[..., fewer] <= expectation.active[..., more] + 1e-9).all()
        assert (expectation.loss[..., fewer] >= expectation.loss[..., more] - 1e-9).all()


def test_layers_count_with_their_own_points(expectation: Expectation) -> None:
    hard, soft = OperatingPoint(True, 1, 0.0), OperatingPoint(True, 3, 0.0)
    both = OperatingPoint(True, 1, 0.0, ((0, hard), (1, soft)))
    one = OperatingPoint(True, 1, 0.0, ((1, OFF),))
    for rows in (5, 1024, 100_000):
        (a1, l1), (a2, l2) = expectation.effect(rows, hard), expectation.effect(rows, soft)
        assert expectation.effect(rows, both) == pytest.approx(((a1 + a2) / 2, (l1 + l2) / 2))
        plain = expectation.plain_active(rows)
        assert expectation.effect(rows, one) == pytest.approx(((a1 + plain) / 2, l1 / 2))
        assert expectation.effect(rows, OFF) == pytest.approx((plain, 0.0))


def test_a_batch_between_two_rows_is_taken_for_the_smaller_one(expectation: Expectation) -> None:
    assert expectation.row_of(0) == expectation.row_of(1) == 0
    rows = [expectation.row_of(n) for n in range(1, 2000)]
    assert rows == sorted(rows) and rows[:16] == list(range(16))
    assert rows[-1] == len(expectation.plain) - 1


def test_in_large_models_some_layers_stand_for_their_neighbours(layer: LayerStatistics) -> None:
    other = LayerStatistics(layer.similarity * 0.5, layer.by_rank, ENERGY)
    many = expect({i: layer if i < 4000 else other for i in range(8000)}, (0.0,))
    few = expect({0: layer, 1: other}, (0.0,))
    assert many.num_layers == 8000
    np.testing.assert_allclose(many.loss[:, [0, 3900, 4100, 7999]], few.loss[:, [0, 0, 1, 1]])
    np.testing.assert_allclose(many.active[:, 1], few.active[:, 0])
