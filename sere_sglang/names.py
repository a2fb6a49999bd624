"""The words that flags, settings and files use, known without importing what they name."""

from __future__ import annotations

import functools
from enum import IntEnum
from importlib import metadata

SIMILARITY = "similarity"
RULES = (SIMILARITY, "piggyback", "topk", "budget", "energy")
"""Which experts a batch loads; docs/semantics.md says exactly what each does."""

AUTO = "auto"
"""``--sere-rule auto``: the profile's best rule (schedule/auto_rule.py)."""

FALLBACK = "sere_fallback"
"""Key of ``/server_info``: why a server with ``--sere-on-error fallback`` runs without SERE."""

POLICY_ENTRY_POINTS = "sere_sglang.policies"
"""Entry-point group of third parties' policies: name -> a `PolicyFactory` (schedule/policy.py)."""

OWN_POLICIES = ("static", "adaptive", "slo")
"""Policies of this package (schedule/registry.py)."""


class RowClass(IntEnum):
    """A row's class, as the kernels read it: a byte per row, and the class table's order.

    Balanced rows follow the policy, exact rows keep every expert and vote with all of them, fast
    rows run at an operating point of their own.
    """

    BALANCED = 0
    EXACT = 1
    FAST = 2


QUALITIES = tuple(row_class.name.lower() for row_class in RowClass)
"""What a request may ask for, in the order of the row classes."""


@functools.cache
def policy_names() -> tuple[str, ...]:
    """Ours first, then third parties' in alphabetical order: the same in every process."""
    others = {entry.name for entry in metadata.entry_points(group=POLICY_ENTRY_POINTS)}
    return (*OWN_POLICIES, *sorted(others - set(OWN_POLICIES)))
