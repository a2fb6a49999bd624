"""rules_cases.py by hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.ops.rules_cases import Batch, T, make_batch


@dataclass
class _Drawn:
    draw: st.DrawFn

    def one_of(self, values: Sequence[T]) -> T:
        return self.draw(st.sampled_from(values))

    def between(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def fraction(self, high: float) -> float:
        return self.draw(st.floats(0, high, width=32))


@st.composite
def batches(draw: st.DrawFn, max_rows: int = 24, max_experts: int = 40, max_k: int = 9) -> Batch:
    return make_batch(_Drawn(draw), max_rows=max_rows, max_experts=max_experts, max_k=max_k)
