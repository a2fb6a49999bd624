"""What ``sere-sglang tune`` measures: budgets at one decode batch size, and their speed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sere_sglang.cli.evaluate_run import in_batches, text_row
from sere_sglang.cli.served import Served
from sere_sglang.measure.cells import Cells
from sere_sglang.measure.forcing import forced_in_batches
from sere_sglang.measure.halving import Target, Trial, halve
from sere_sglang.measure.load import NoOverlap, run_load
from sere_sglang.measure.routing import OFF, Routing
from sere_sglang.measure.texts import Text, as_many
from sere_sglang.measure.turns import use
from sere_sglang.measure.weight import Weigher
from sere_sglang.schedule.cost import MoeCost, StepModel
from sere_sglang.schedule.cost_file import described

CANDIDATES = tuple(float(f"{x:.3g}") for x in np.geomspace(0.002, 0.5, 12))
"""Budgets that are tried at every batch size."""

_WARM_UP = 48  # tokens of every stream, before a server's model of its steps is believed


@dataclass(frozen=True)
class Expected:
    """What the server expects a step to take: its cost table and what steps took so far."""

    cost: MoeCost
    step: StepModel

    @classmethod
    def of(cls, served: Served, prompts: Sequence[list[int]]) -> Expected:
        """After it has decoded some tokens of `prompts` at once, as users' are decoded."""
        with contextlib.suppress(NoOverlap):
            run_load(use(served.servers, OFF), prompts, _WARM_UP)
        return cls(
            described(served.info["sere"]["cost"]),
            StepModel(**served.sere.sere()["feedback"]["step"]),
        )

    def speedup(self, batch: int, active: float, share: float) -> float:
        """Of loading `share` of the `active` experts, summed over layers, that exact routing
        loads."""
        whole, less = (
            float(self.step.step_ms(batch, self.cost.moe_ms(batch, x)))
            for x in (active, share * active)
        )
        return whole / less if less > 0 else 1.0


@dataclass(frozen=True)
class Measured:
    """What the searches of all batch sizes share. cells: kept between runs, under keys that hold
    `about`."""

    weigher: Weigher
    cells: Cells
    about: dict[str, Any]


@dataclass
class Search:
    """At one batch size. rows: every cell, as `text_row` has it, with ``budget``, ``samples`` and
    ``speedup``; chosen: the best of them, None where exact routing is."""

    served: Served
    rule: str
    batch: int
    target: Target
    texts: list[Text]
    measured: Measured
    advance: Callable[[str], None]
    rows: list[dict[str, Any]] = field(default_factory=list)
    chosen: dict[str, Any] | None = None
    _expected: Expected | None = None
    _exact: np.ndarray | None = None
    _active: float = 0.0

    def run(self, sequences: int) -> None:
        """All candidates, then fewer on more text, up to so many sequences."""
        best, _ = halve(CANDIDATES, sequences, self.target, self._measure)
        if best is not None:
            self.chosen = next(
                row for row in reversed(self.rows)
                if (row["budget"], row["samples"]) == (best.candidate, best.samples)
            )  # fmt: skip

    def cell(self, budget: float, samples: int) -> dict[str, Any]:
        """Measured, or taken from an interrupted run."""
        texts = in_batches(self.texts, max(samples, self.batch), self.batch)
        key = {"kind": "tune", "rule": self.rule, "batch": self.batch, "budget": budget}
        key |= {"sequences": len(texts), **self.measured.about}
        found = self.measured.cells.get(key)
        if found is None:
            expected, exact, active = self._exact_of(texts)
            found = text_row(
                self.served, self.point(budget), texts, self.batch, exact, self.measured.weigher
            )
            found["speedup"] = expected.speedup(self.batch, active, found["bytes_share"])
            self.measured.cells.add(key, found)
        self.advance(f"batch {self.batch}, budget {budget:g}")
        return {"budget": budget, "samples": samples, "batch": self.batch, **found}

    def point(self, budget: float) -> Routing:
        """The adaptive policy at a budget, wherever it expects any gain."""
        settings = {
            "enabled": True, "policy": "adaptive", "rule": self.rule, "quality_budget": budget,
            "tuned": False, "min_batch": 1, "min_gain": 0.0,
        }  # fmt: skip
        return Routing(f"budget={budget:g}", settings)

    def trial(self, row: dict[str, Any]) -> Trial:
        """A row, by what is to meet the target."""
        value = row["kl"] if self.target.stay == "below" else row["speedup"]
        return Trial(row["budget"], row["samples"], value)

    def _measure(self, budget: float, samples: int) -> Trial:
        row = self.cell(budget, samples)
        self.rows.append(row)
        return self.trial(row)

    def _exact_of(self, texts: list[Text]) -> tuple[Expected, np.ndarray, float]:
        """Exact routing: what a step takes, its distributions, and the experts that it loads,
        summed over layers."""
        if self._expected is None:
            prompts = [text.prompt_ids for text in as_many(self.texts, self.batch)]
            self._expected = Expected.of(self.served, prompts)
            self.measured.weigher.counts_exactly()
            forced_in_batches(self.served.sere, texts[: self.batch], self.batch)
            self._active = self.measured.weigher.active()
        if self._exact is None or len(self._exact) != len(texts):
            use(self.served.servers, OFF)
            self._exact = forced_in_batches(self.served.sere, texts, self.batch)
        return self._expected, self._exact, self._active
