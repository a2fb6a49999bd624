"""What ``sere-sglang tune`` writes into a profile: a quality budget for every batch size.

Metadata entry ``tuning`` of format 1.3, JSON: ``{"rules": {rule: {"rows": [{"batch", "budget"},
...], "about": {...}}}}``, rows by growing batch size. `about` is for people. A reader that does not
know the entry, or a rule, serves as if it were not there.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sere_sglang.errors import ProfileError, cut, shown

_MOST_ROWS = 64
_LARGEST = (1 << 31) - 1


@dataclass(frozen=True)
class Tuning:
    """rows: rule -> ((batch, budget), ...), by growing batch size."""

    rows: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)

    def budget(self, rule: str, batch: int) -> float | None:
        """Expected loss that a decode batch of `batch` rows may cost under `rule`; None where the
        profile says nothing.

        Between two batch sizes it is linear in the logarithm of the batch; outside it is that of
        the nearest one.
        """
        rows = self.rows.get(rule)
        if not rows:
            return None
        above = bisect_right(rows, batch, key=lambda row: row[0])
        if above in (0, len(rows)):
            return rows[min(above, len(rows) - 1)][1]
        (low, at_low), (high, at_high) = rows[above - 1], rows[above]
        share = math.log(batch / low) / math.log(high / low)
        return (1.0 - share) * at_low + share * at_high


UNTUNED = Tuning()


def read_tuning(path: object, entry: Mapping[str, Any]) -> Tuning:
    """From a profile's metadata entry, which may come from anywhere. Raises `ProfileError`."""
    rules = entry.get("rules", {})
    if not isinstance(rules, dict):
        raise _refusal(path, "rules is no object")
    return Tuning({rule: _rows(path, rule, told) for rule, told in rules.items()})


def _rows(path: object, rule: str, told: Any) -> tuple[tuple[int, float], ...]:
    rows = told.get("rows") if isinstance(told, dict) else None
    if not isinstance(rows, list) or not 1 <= len(rows) <= _MOST_ROWS:
        raise _refusal(path, f"rule {shown(rule)} needs 1 to {_MOST_ROWS} rows")
    found: list[tuple[int, float]] = []
    for row in rows:
        told_of: dict[str, Any] = row if isinstance(row, dict) else {}
        batch, budget = told_of.get("batch"), told_of.get("budget")
        least = found[-1][0] + 1 if found else 1
        if type(batch) is not int or not least <= batch <= _LARGEST:
            raise _refusal(path, f"rule {shown(rule)}: batch sizes must grow, got {shown(batch)}")
        if not isinstance(budget, (int, float)) or not 0.0 <= budget <= 1.0:
            raise _refusal(
                path,
                f"rule {shown(rule)}: budget of batch {batch} must lie in [0, 1], got "
                f"{shown(budget)}",
            )
        found.append((batch, float(budget)))
    return tuple(found)


def _refusal(path: object, what: str) -> ProfileError:
    return ProfileError(f"{path}: metadata tuning: {cut(what, 200)}; tune again")
