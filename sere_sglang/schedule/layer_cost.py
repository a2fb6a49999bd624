"""What one MoE layer costs by rows and active experts: as it was timed, or from two speeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

_SWEEPS = 200
_CONVERGED = 1e-9  # of a logarithm of milliseconds


@dataclass(frozen=True)
class LayerShape:
    """What layers have in common that are timed once; sizes are of one rank's part.

    weights: how they are held, for instance ``bfloat16`` or ``Fp8MoEMethod``.
    expert_bytes: of one active expert's weights; slot_flops: of multiplying one routed slot.
    share: of the active experts and of the slots that this rank computes (expert parallelism).
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    weights: str = ""
    expert_bytes: float = 0.0
    slot_flops: float = 0.0
    share: float = 1.0

    def most_active(self, rows: float) -> float:
        """Active experts that so many rows can have at most."""
        return float(min(self.num_experts, max(rows, 1.0) * self.top_k))


class LayerCost(Protocol):
    """One layer's time at a number of rows, as a curve over its active experts."""

    @property
    def shape(self) -> LayerShape: ...

    def curve(self, rows: float) -> tuple[np.ndarray, np.ndarray]:
        """(active experts ascending from 0, milliseconds) ``[n]``: straight in between, constant
        beyond. Never falls along either axis."""
        ...


@dataclass(frozen=True)
class MeasuredCost:
    """A table of measured times.

    rows, active: ascending. ms: float64 ``[rows, active]``, finite, positive, not falling along
    either axis. timed: bool ``[rows, active]``, False where nobody measured: more experts than
    the rows can have, or no time was left.
    """

    shape: LayerShape
    rows: tuple[int, ...]
    active: tuple[int, ...]
    ms: np.ndarray
    timed: np.ndarray

    @classmethod
    def fit(
        cls, shape: LayerShape, rows: Sequence[int], active: Sequence[int], ms: np.ndarray
    ) -> MeasuredCost:
        """From times with noise, NaN where there is none. Rows and columns without any are left
        out; there must be one at least in the first column that stays."""
        ms = np.asarray(ms, dtype=np.float64)
        keep_rows, keep_columns = (np.isfinite(ms).any(axis=axis) for axis in (1, 0))
        ms = ms[keep_rows][:, keep_columns]
        timed = np.isfinite(ms)
        filled = _fill(np.array(active)[keep_columns], isotonic(ms))
        return cls(
            shape,
            tuple(int(n) for n in np.array(rows)[keep_rows]),
            tuple(int(n) for n in np.array(active)[keep_columns]),
            np.maximum.accumulate(np.maximum.accumulate(filled, axis=0), axis=1),
            timed,
        )

    def curve(self, rows: float) -> tuple[np.ndarray, np.ndarray]:
        """Straight between rows of the table and on beyond the last one; constant before the
        first. Below the first column straight on too, but no cheaper than in proportion."""
        ms = self._row(rows)
        x, y = np.array(self.active, dtype=np.float64), ms
        slope = (y[1] - y[0]) / (x[1] - x[0]) if len(x) > 1 else 0.0
        zero = max(float(y[0] - slope * x[0]), 0.0)
        x, y = np.concatenate([[0.0], x]), np.concatenate([[zero], y])
        most = self.shape.most_active(rows)
        if most > x[-1]:  # a table that ends before the layer's experts do
            slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
            return np.append(x, most), np.append(y, y[-1] + slope * (most - x[-1]))
        inside = x < most
        return np.append(x[inside], most), np.append(y[inside], np.interp(most, x, y))

    def _row(self, rows: float) -> np.ndarray:
        last = len(self.rows) - 1
        if last == 0 or rows <= self.rows[0]:
            return self.ms[0]
        after = min(int(np.searchsorted(self.rows, rows)), last)
        low, high = self.rows[after - 1], self.rows[after]
        step = (self.ms[after] - self.ms[after - 1]) / (high - low)
        if rows <= high:
            return self.ms[after - 1] + step * (rows - low)
        # More experts must not become cheaper than fewer, far beyond the table.
        return self.ms[after] + np.maximum.accumulate(step) * (rows - high)


@dataclass(frozen=True)
class BandwidthCost:
    """A layer loads its active experts or multiplies its rows, whichever takes longer.

    expert_ms: to read one active expert's weights; slot_ms: to multiply one routed slot.
    """

    shape: LayerShape
    expert_ms: float
    slot_ms: float

    def curve(self, rows: float) -> tuple[np.ndarray, np.ndarray]:
        multiply = rows * self.shape.top_k * self.slot_ms
        most = self.shape.most_active(rows)
        equal = multiply / self.expert_ms if self.expert_ms > 0.0 else most
        x = np.array([0.0, min(equal, most), most])
        return x, np.maximum(x * self.expert_ms, multiply)


def isotonic(ms: np.ndarray) -> np.ndarray:
    """The closest table that does not fall along either axis, by squared error of the logarithm
    (noise grows with the time). NaN stays NaN and counts for nothing.

    Dykstra's alternating projections; each is the pool-adjacent-violators algorithm on the lines
    of one axis (Dykstra and Robertson, 1982).
    """
    fitted = np.log(ms)
    by_rows, by_columns = np.zeros_like(fitted), np.zeros_like(fitted)
    for _ in range(_SWEEPS):
        before = fitted
        wanted = fitted + by_rows
        fitted = np.apply_along_axis(_pool, 0, wanted)
        by_rows = wanted - fitted
        wanted = fitted + by_columns
        fitted = np.apply_along_axis(_pool, 1, wanted)
        by_columns = wanted - fitted
        if np.nanmax(np.abs(fitted - before)) < _CONVERGED:
            break
    return np.exp(fitted)


def _pool(line: np.ndarray) -> np.ndarray:
    """Pool adjacent violators: the closest line that does not fall; NaN stays NaN."""
    there = np.isfinite(line)
    means: list[float] = []
    counts: list[int] = []
    for value in line[there].tolist():
        means.append(value)
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            value, count = means.pop(), counts.pop()
            means[-1] = (means[-1] * counts[-1] + value * count) / (counts[-1] + count)
            counts[-1] += count
    pooled = np.full_like(line, np.nan)
    pooled[there] = np.repeat(means, counts)
    return pooled


def _fill(active: np.ndarray, ms: np.ndarray) -> np.ndarray:
    """A value for every NaN: its row goes on like the nearest one that was timed there; where
    there is none, in proportion to the experts."""
    ms = ms.copy()
    ms[:, 0] = _fill_line(ms[:, 0])
    timed = np.isfinite(ms)
    for column in range(1, ms.shape[1]):
        known = np.flatnonzero(timed[:, column] & timed[:, column - 1])
        for row in np.flatnonzero(~timed[:, column]):
            before = ms[row, column - 1]
            if len(known):
                like = known[np.abs(known - row).argmin()]
                ms[row, column] = before + ms[like, column] - ms[like, column - 1]
            else:
                ms[row, column] = before * active[column] / active[column - 1]
    return ms


def _fill_line(line: np.ndarray) -> np.ndarray:
    """NaN takes the value before it, the first ones the value after them."""
    there = np.flatnonzero(np.isfinite(line))
    return line[there[np.maximum(np.searchsorted(there, np.arange(len(line)), "right") - 1, 0)]]
