"""Successive halving (by thirds) for one number that a monotone measure is to meet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Trial:
    """One candidate, measured on so many samples. value: what is to meet the target."""

    candidate: float
    samples: int
    value: float


REFINED = 2
"""Further candidates that are tried between the last two."""

_FACTOR, _FEWEST = 3, 8
_STEPS_BACK = 3  # where little text had made the last candidates look better than they are
Measure = Callable[[float, int], Trial]
"""Of a candidate, on so many samples."""


@dataclass(frozen=True)
class Target:
    """stay: "below": the largest candidate whose value is at most `value`; "above": the smallest
    one whose value is at least that. Values grow with candidates, but for noise."""

    value: float
    stay: Literal["below", "above"]

    def distance(self, trial: Trial) -> float:
        """How far off, in factors; what is kept is near on either side."""
        return abs(math.log(max(trial.value, 1e-12) / self.value))

    def holds(self, trial: Trial) -> bool:
        return trial.value <= self.value if self.stay == "below" else trial.value >= self.value

    def safer(self, candidates: Sequence[float], than: Sequence[Trial]) -> list[float]:
        """Candidates further from the wrong side than all of those, the nearest first."""
        known = [trial.candidate for trial in than]
        if self.stay == "below":
            return sorted((c for c in candidates if c < min(known)), reverse=True)
        return sorted(c for c in candidates if c > max(known))

    def best(self, trials: Sequence[Trial]) -> Trial | None:
        """Of those that hold; None where none does."""
        holding = [t for t in trials if self.holds(t)]
        if not holding:
            return None
        pick = max if self.stay == "below" else min
        return pick(holding, key=lambda trial: trial.candidate)


def rounds_of(candidates: int, samples: int) -> list[tuple[int, int]]:
    """(candidates, samples) of each round: a third as many on three times as many samples, the last
    two on all `samples`."""
    found = [candidates]
    while found[-1] > 2:
        found.append(max(2, math.ceil(found[-1] / _FACTOR)))
    last = len(found) - 1
    return [
        (count, min(samples, max(_FEWEST, samples // _FACTOR ** (last - i))))
        for i, count in enumerate(found)
    ]


def halve(
    candidates: Sequence[float], samples: int, target: Target, measure: Measure
) -> tuple[Trial | None, list[Trial]]:
    """The best candidate on all samples, None where none holds, and everything that was measured.

    Between the last two candidates around the target further ones are tried, where it should be
    met if the logarithms of value and candidate lie on a line.
    """
    kept = sorted(candidates)
    seen: list[Trial] = []
    for count, amount in rounds_of(len(kept), samples):
        if seen:
            last = {t.candidate: t for t in seen}
            kept = sorted(sorted(kept, key=lambda c: target.distance(last[c]))[:count])
        seen += [measure(candidate, amount) for candidate in kept]
    final = seen[-len(kept) :]
    for _ in range(REFINED):
        between = _between(sorted(final, key=lambda trial: trial.candidate), target)
        if between is None or between in {trial.candidate for trial in final}:
            break
        final.append(measure(between, samples))
        seen.append(final[-1])
    for safer in target.safer(candidates, final)[:_STEPS_BACK]:
        if target.best(final) is not None:
            break
        final.append(measure(safer, samples))
        seen.append(final[-1])
    return target.best(final), seen


def _between(trials: Sequence[Trial], target: Target) -> float | None:
    """A candidate between two neighbours on the two sides of the target."""
    for low, high in itertools.pairwise(trials):
        if 0 < low.value < target.value < high.value:
            share = math.log(target.value / low.value) / math.log(high.value / low.value)
            # A little towards the side that is asked for.
            share = 0.95 * share if target.stay == "below" else 1 - 0.95 * (1 - share)
            found = low.candidate * (high.candidate / low.candidate) ** share
            return float(f"{found:.4g}")
    return None
