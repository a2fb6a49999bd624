"""What the scheduler is about to run, as the policies see it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

Mode = Literal["decode", "extend", "mixed", "verify", "idle"]


class MoeRows(enum.Enum):
    """Whose rows the MoE layers of a rank route."""

    OWN = "the rank's own batch"
    GATHERED = "the batches of all DP groups, with padding in between"
    SLICE = "a slice of its group's batch"


@dataclass(frozen=True)
class BatchComposition:
    """One forward of the target model. Token counts are rows that a MoE layer of this rank routes,
    without padding: under DP attention those of all groups together (`MoeRows.GATHERED`).

    padded_rows: rows the kernels will see, the size of the CUDA graph that fits; equal to
        `num_tokens` when there is none.
    running, waiting: requests in the scheduler; with gathered rows those that decode, and 0,
        as each group has a queue of its own.
    exact_rows, fast_rows: decode-like rows whose request asked for that quality.
    step: number of the forward, counted by this rank.
    after_idle: the scheduler had nothing to run before it.
    """

    mode: Mode
    decode_tokens: int = 0
    prefill_tokens: int = 0
    verify_tokens: int = 0
    padded_rows: int = 0
    running: int = 0
    waiting: int = 0
    exact_rows: int = 0
    fast_rows: int = 0
    step: int = 0
    after_idle: bool = False

    @property
    def num_tokens(self) -> int:
        return self.decode_tokens + self.prefill_tokens + self.verify_tokens

    @property
    def free_share(self) -> float:
        """Of the rows, those that re-routing may change."""
        return 1.0 - self.exact_rows / max(self.num_tokens, 1)

    def loss_factor(self, rule: str) -> float:
        """What exact rows leave of a point's loss, since they lose nothing. What ``energy`` may
        lose is of all rows already: its kernel counts exact ones too."""
        return 1.0 if rule == "energy" else self.free_share

    @property
    def is_decode_like(self) -> bool:
        """Every row is a decode step or a draft to verify: the memory-bound case SERE is for."""
        return self.mode in ("decode", "verify")
