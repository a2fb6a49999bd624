"""Per-layer counters that the implementations add to, on the device, without synchronizing."""

from __future__ import annotations

import torch

COUNTER_FIELDS = ("forwards", "rows", "active_before", "active_after", "rerouted", "critical")
"""One int64 each, in this order:

forwards: enabled forwards that had at least one valid row
rows: valid rows in them
active_before, active_after: distinct experts of the valid rows, before re-routing and after it:
    P and the critical ones, A. Where A has fewer than K members a row's surplus slots, of weight 0,
    name others, which are not counted (docs/semantics.md, rule 8)
rerouted: slots that moved to another expert
critical: secondary slots outside P that stayed, because nothing in P reached the threshold
"""


def new_counters(num_layers: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Zeroed accumulators, int64 ``[num_layers, 6]``; hand row ``i`` to layer ``i``."""
    return torch.zeros(num_layers, len(COUNTER_FIELDS), dtype=torch.int64, device=device)
