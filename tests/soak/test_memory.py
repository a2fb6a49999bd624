"""The slope of a process' memory: what counts as growth."""

import numpy as np
import pytest

from tests.soak.memory import slope_of

SECONDS = np.arange(1200.0)
NOISE = np.random.default_rng(0).normal(0.0, 0.1, len(SECONDS))


def _interval(mib: np.ndarray) -> tuple[float, float]:
    samples = list(zip(SECONDS.tolist(), (mib + NOISE).tolist(), strict=True))
    slope = slope_of("scheduler", samples, samples)
    return slope.low, slope.high


def test_one_step_is_no_trend() -> None:
    """As glibc's arenas grow: a straight line through it has a slope, and little beside it."""
    low, high = _interval(np.where(SECONDS < 300, 2447.0, 2454.0))
    assert low < 5 < high


@pytest.mark.parametrize("leak", [300.0, 3000.0])
def test_a_leak_is(leak: float) -> None:
    low, high = _interval(2000.0 + leak * SECONDS / 3600)
    assert 0.7 * leak < low < leak < high < 1.3 * leak


def test_many_small_steps_are_a_leak() -> None:
    stairs = 4.0 * np.cumsum(np.random.default_rng(1).random(len(SECONDS)) < 0.02)
    low, _ = _interval(2000.0 + stairs)
    assert low > 100
