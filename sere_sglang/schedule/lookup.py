"""Batch sizes that tables over them are computed at, and the rows that stand for all the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

COMPUTED = (1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 1024)
MAX_ROWS = COMPUTED[-1]  # larger batches are looked up as this many: all popular experts are in


def _lookup_rows() -> tuple[np.ndarray, np.ndarray]:
    """Batch sizes of the tables, every one up to 16 and then 6 % apart; row of each batch."""
    steps = np.geomspace(16, MAX_ROWS, 72).round().astype(int)
    rows = np.unique(np.concatenate([np.arange(1, 17), steps]))
    row_of = np.searchsorted(rows, np.maximum(np.arange(MAX_ROWS + 1), 1), side="right") - 1
    return rows, row_of


_ROWS, _ROW_OF = _lookup_rows()


def row_of(batch: int) -> int:
    """Row of a spread table for a batch of `batch` rows; a smaller batch's where there is none,
    whose loss is the larger one."""
    return int(_ROW_OF[min(batch, MAX_ROWS)])


def spread(table: np.ndarray) -> np.ndarray:
    """From `COMPUTED` to `_ROWS` along the first axis, linear in the logarithm."""
    at, known = np.log2(_ROWS), np.log2(COMPUTED)
    upper = np.clip(np.searchsorted(known, at), 1, len(known) - 1)
    share = (at - known[upper - 1]) / (known[upper] - known[upper - 1])
    share = share.reshape(-1, *[1] * (table.ndim - 1))
    return (1.0 - share) * table[upper - 1] + share * table[upper]


def representatives(ids: Sequence[int], most: int) -> tuple[list[int], np.ndarray]:
    """Layers that are looked at, evenly spaced, and for each of `ids` which of those stands for
    it, as an index into those. most: how many are looked at."""
    chosen = np.unique(
        np.linspace(0, len(ids) - 1, min(max(most, 2), len(ids))).round().astype(int)
    )
    nearest = np.abs(np.arange(len(ids))[:, None] - chosen).argmin(axis=1)
    return [ids[i] for i in chosen], nearest


def present(probability: np.ndarray, rows: np.ndarray | int) -> np.ndarray:
    """Probability that at least one of n rows has each expert, ``[E]`` or ``[E, rows]``."""
    miss = 1.0 - np.clip(probability, 0.0, 1.0)
    return 1.0 - np.power(miss[:, None] if np.ndim(rows) else miss, rows)
