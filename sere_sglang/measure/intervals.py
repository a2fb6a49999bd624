"""How sure a figure is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

_RESAMPLES = 4000
_Z = 1.959964  # 95 %


def interval(
    samples: Sequence[float] | np.ndarray,
    of: Callable[..., np.ndarray] = np.median,
    level: float = 0.95,
    resamples: int = _RESAMPLES,
) -> tuple[float, float]:
    """Confidence interval of the median, or of another statistic with an axis, by resampling."""
    from scipy.stats import bootstrap

    if len(samples) < 2:  # nothing to resample
        only = float(of(np.asarray(samples), axis=0))
        return only, only
    found = bootstrap(
        (samples,), of, confidence_level=level, n_resamples=resamples, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


def share_interval(scores: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean of scores from 0 to 1 (Wilson 1927); not certain at 0 and 1 either,
    where resampling would be."""
    n, share = len(scores), float(np.mean(scores))
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def difference_interval(differences: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean difference of scores on the same questions, each from -1 to 1
    (Bonett and Price 2012)."""
    found = np.asarray(differences)
    n = len(found) + 2
    gained, lost = ((sign * found).clip(0).sum() + 1 for sign in (1, -1))
    middle = (gained - lost) / n
    half = _Z * math.sqrt(((gained + lost) / n - middle**2) / n)
    return max(float(middle - half), -1.0), min(float(middle + half), 1.0)
