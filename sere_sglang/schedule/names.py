"""The names that ``--sere-policy`` takes, known without building or importing any policy."""

from __future__ import annotations

import functools
from importlib import metadata

ENTRY_POINTS = "sere_sglang.policies"
"""Entry-point group of third parties' policies: name -> a `PolicyFactory` (policy.py)."""

OWN = ("static", "adaptive", "slo")
"""Policies of this package (registry.py)."""


@functools.cache
def policy_names() -> tuple[str, ...]:
    """Ours first, then third parties' in alphabetical order: the same in every process."""
    others = {entry.name for entry in metadata.entry_points(group=ENTRY_POINTS)}
    return (*OWN, *sorted(others - set(OWN)))
