"""Ladders: from exact to the hardest skipping, one layer at a time, the best bargain first."""

from __future__ import annotations

import numpy as np
import pytest

from sere_sglang.schedule.ladder import Ladders
from sere_sglang.schedule.point import OFF, OperatingPoint
from tests.schedule.toy_model import LAYERS, TOP_K, expectation

LADDERS = Ladders(expectation())


@pytest.mark.parametrize("batch", [1, 3, 8, 33, 100, 5000])
def test_rungs_lead_from_exact_to_the_hardest_skipping(batch: int) -> None:
    ladder = LADDERS.of(batch)
    assert (np.diff(ladder.loss) >= 0).all() and (np.diff(ladder.active) <= 0).all()
    assert ladder.loss[0] == 0.0
    assert ladder.active[0] == pytest.approx(expectation().plain_active(batch))
    row = expectation().row_of(batch)
    assert ladder.active[-1] == pytest.approx(expectation().active[row].min(axis=1).sum())


@pytest.mark.parametrize("batch", [4, 32])
def test_points_do_what_their_rung_says(batch: int) -> None:
    ladder = LADDERS.of(batch)
    assert LADDERS.point(batch, 0) == OFF
    for rung in range(1, len(ladder.loss)):
        active, loss = expectation().effect(batch, LADDERS.point(batch, rung))
        assert loss == pytest.approx(ladder.loss[rung], abs=1e-9)
        assert active == pytest.approx(ladder.active[rung])
        assert LADDERS.point(batch, rung) is LADDERS.point(batch, rung)


@pytest.mark.parametrize("batch", [4, 32])
def test_every_static_s_is_a_rung(batch: int) -> None:
    ladder = LADDERS.of(batch)
    for s in range(1, TOP_K):
        active, loss = expectation().effect(batch, OperatingPoint(True, s, 0.0))
        near = np.isclose(ladder.active, active, rtol=1e-3) & np.isclose(ladder.loss, loss, 1e-2)
        assert near.any()


@pytest.mark.parametrize("batch", [4, 32])
def test_s_falls_by_one_for_all_layers_before_it_falls_further(batch: int) -> None:
    row = expectation().row_of(batch)
    for rung in range(1, len(LADDERS.of(batch).loss)):
        own = [LADDERS.point(batch, rung).at(layer) for layer in range(LAYERS)]
        kept = [p.primary_k if p.enabled else TOP_K for p in own]
        for layer, s in enumerate(kept):
            for skipped in range(min(kept) + 1, s):  # it had nothing to offer to this layer
                after = expectation().active[row, layer]
                columns = [i for i, p in enumerate(expectation().points) if p.primary_k == skipped]
                now = expectation().effect(batch, OperatingPoint(True, 1, 0.0, _only(layer, own)))
                gained = now[0] - _others(row, layer) - after[columns].min()
                assert gained < 0.05


def test_from_one_s_to_the_next_the_best_bargain_goes_first() -> None:
    ladder = LADDERS.of(32)
    level = [r for r in range(1, len(ladder.loss)) if _level(LADDERS.point(32, r)) == 1]
    slopes = np.diff(ladder.active[level]) / np.diff(ladder.loss[level])
    assert len(slopes) > LAYERS and (np.diff(slopes) >= 0).all()


def test_layers_with_better_substitutes_skip_harder() -> None:
    """Layer 0 has the worst; see toy_model.py."""
    points = [LADDERS.point(32, rung) for rung in range(1, len(LADDERS.of(32).loss))]
    between = [p for p in points if str(p) == "S=3-4"]
    own = np.array([[p.at(layer).primary_k for layer in range(LAYERS)] for p in between])
    assert own[:, 0].mean() > own[:, -1].mean()
    assert [p.mean_primary_k for p in between] == own.mean(axis=1).tolist()


def _level(point: OperatingPoint) -> int:
    return min(p.primary_k for p in map(point.at, range(LAYERS)) if p.enabled)


def _only(layer: int, own: list[OperatingPoint]) -> tuple[tuple[int, OperatingPoint], ...]:
    return tuple((i, own[i] if i == layer else OFF) for i in range(LAYERS))


def _others(row: int, layer: int) -> float:
    return float(expectation().plain[row].sum() - expectation().plain[row, layer])
