"""How sure a figure is: bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_RESAMPLES = 4000


def interval(
    samples: Sequence[float] | np.ndarray,
    of: Callable[..., np.ndarray] = np.median,
    level: float = 0.95,
) -> tuple[float, float]:
    """Confidence interval of the median, or of another statistic with an axis, by resampling."""
    draws = np.random.default_rng(0).choice(samples, (_RESAMPLES, len(samples)))
    tail = 50 * (1 - level)
    low, high = np.percentile(of(draws, axis=1), [tail, 100 - tail])
    return float(low), float(high)
