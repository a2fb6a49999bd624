"""Ways to re-route, compared where they load equally many bytes.

Every way is measured at some operating points; between two of them the logarithm of the KL is taken
to be linear in the share of bytes. Intervals are paired: every way has met the same sequences, so a
resample draws sequences and looks at all ways on those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHARES = (0.25, 0.4, 0.6, 0.8)
_RESAMPLES = 2000


@dataclass(frozen=True)
class Curve:
    """One way at one batch size: bytes loaded, of plain routing, ``[points]``; KL of every sequence
    there, ``[points, sequences]``."""

    bytes_share: np.ndarray
    kl: np.ndarray

    def at(self, share: float, weights: np.ndarray | None = None) -> float:
        """Mean KL where `share` of the bytes is loaded; NaN outside what was measured.

        weights: how often each sequence counts.
        """
        order = np.argsort(self.bytes_share)
        x = self.bytes_share[order]
        if not x[0] - 0.01 <= share <= x[-1] + 0.01:
            return float("nan")
        kl = np.average(self.kl, axis=1, weights=weights)[order]
        return float(np.exp(np.interp(share, x, np.log(np.maximum(kl, 1e-9)))))


def compared(curves: Mapping[str, Curve], against: str) -> list[dict[str, Any]]:
    """Rows ``{"share", "rule", "kl", "ratio", "interval"}``: ratios to `against`, where both were
    measured."""
    sequences = curves[against].kl.shape[1]
    draws = np.random.default_rng(0).integers(0, sequences, (_RESAMPLES, sequences))
    counts = [np.bincount(draw, minlength=sequences) for draw in draws]
    rows = []
    for share in SHARES:
        for rule, curve in curves.items():
            kl, base = curve.at(share), curves[against].at(share)
            if np.isnan(kl) or np.isnan(base):
                continue
            ratios = [curve.at(share, w) / curves[against].at(share, w) for w in counts]
            low, high = np.percentile(ratios, (2.5, 97.5))
            rows.append(
                {"share": share, "rule": rule, "kl": kl, "ratio": kl / base,
                 "interval": [float(low), float(high)]}
            )  # fmt: skip
    return rows


def print_compared(rows: Sequence[Mapping[str, Any]], line: str, column: str) -> None:
    """Rows of `compared`: a line for each value of `line` and share of bytes, a column for each of
    `column`; in a cell the KL, its ratio and the interval of that."""
    columns = list(dict.fromkeys(row[column] for row in rows))
    print(f"{line:>14} {'bytes':>6}  " + "  ".join(f"{name:>22}" for name in columns))
    for own, share in dict.fromkeys((row[line], row["share"]) for row in rows):
        cells = {r[column]: r for r in rows if (r[line], r["share"]) == (own, share)}
        shown = [
            f"{c['kl']:.4f} {c['ratio']:.2f} [{c['interval'][0]:.2f},{c['interval'][1]:.2f}]"
            if (c := cells.get(name)) else "-" for name in columns
        ]  # fmt: skip
        print(f"{own:>14} {share:>6.0%}  " + "  ".join(f"{cell:>22}" for cell in shown))


def mean_ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Rule -> geometric mean of its ratios over all cells."""
    rules = dict.fromkeys(row["rule"] for row in rows)
    return {
        rule: float(np.exp(np.mean([np.log(r["ratio"]) for r in rows if r["rule"] == rule])))
        for rule in rules
    }
