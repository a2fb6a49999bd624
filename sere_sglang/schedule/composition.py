"""What the scheduler is about to run, as the policies see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["decode", "extend", "mixed", "verify", "idle"]


@dataclass(frozen=True)
class BatchComposition:
    """One forward of the target model, before padding. Counts are tokens (MoE input rows)."""

    mode: Mode
    decode_tokens: int = 0
    prefill_tokens: int = 0
    verify_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.decode_tokens + self.prefill_tokens + self.verify_tokens

    @property
    def is_decode_like(self) -> bool:
        """Every row is a decode step or a draft to verify: the memory-bound case SERE is for."""
        return self.mode in ("decode", "verify")
