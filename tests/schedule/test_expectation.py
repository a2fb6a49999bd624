"""The closed form against drawing batches and re-routing them with the reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sere_sglang.ops import reroute
from sere_sglang.schedule.expectation import (
    Expectation,
    LayerStatistics,
    expect,
    rank_weights,
)

E, K = 32, 4
THRESHOLDS = (0.0, 0.5)


@pytest.fixture(scope="module")
def layer() -> LayerStatistics:
    rng = np.random.default_rng(3)
    similarity = rng.random((E, E))
    similarity = (similarity + similarity.T) / 2
    np.fill_diagonal(similarity, 1.0)
    return LayerStatistics(similarity.astype(np.float32), _by_rank(rng))


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
    weights = rank_weights(K)
    plain, active, loss = [], [], []
    for _ in range(200):
        ids = _draw(rng, scores, rows)
        after = reroute(
            torch.from_numpy(ids).int(), similarity, primary_k=s, threshold=rho, impl="torch"
        ).numpy()
        plain.append(len(np.unique(ids)))
        active.append(len(np.unique(after)))
        moved = (1.0 - layer.similarity[ids, after]) * (ids != after)
        loss.append(float((moved * weights).sum(axis=1).mean()))
    column = expectation.points.index((s, rho))
    assert expectation.plain[rows] == pytest.approx(2 * np.mean(plain), rel=0.06)
    assert expectation.active[rows, column] == pytest.approx(2 * np.mean(active), rel=0.12)
    assert expectation.loss[rows, column] == pytest.approx(np.mean(loss), rel=0.2, abs=0.003)


def test_more_rows_make_better_substitutes(expectation: Expectation) -> None:
    for i, (_, rho) in enumerate(expectation.points):
        if rho == 0.0:
            assert (np.diff(expectation.loss[1:, i]) <= 1e-9).all()
    assert (np.diff(expectation.plain[1:]) >= 0).all()


def test_larger_s_skips_less_and_loses_less(expectation: Expectation) -> None:
    exact = [i for i, (_, rho) in enumerate(expectation.points) if rho == 0.0]
    for fewer, more in itertools.pairwise(exact):
        assert (expectation.active[1:, fewer] <= expectation.active[1:, more] + 1e-9).all()
        assert (expectation.loss[1:, fewer] >= expectation.loss[1:, more] - 1e-9).all()


def test_large_models_are_represented_by_some_layers(layer: LayerStatistics) -> None:
    many = expect(dict.fromkeys(range(300), layer), (0.0,))
    few = expect({0: layer}, (0.0,))
    np.testing.assert_allclose(many.active, 300 * few.active)
    np.testing.assert_allclose(many.loss, few.loss)
