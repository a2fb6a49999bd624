"""What one rank found out and all ranks know: the only road from a clock to a decision."""

from __future__ import annotations

from dataclasses import dataclass, field

from sere_sglang.schedule.cost import StepModel


@dataclass(frozen=True)
class Feedback:
    """Sent by the rank that receives requests, applied by every rank at the same step.

    step: what decode steps take; the hardware's own numbers until some were measured.
    step_ms: smoothed time of the last steps; None before there is one.
    budget: expected loss that ``slo`` allows at present; None before it has decided.
    """

    step: StepModel = field(default_factory=StepModel)
    step_ms: float | None = None
    budget: float | None = None


NO_FEEDBACK = Feedback()


@dataclass(frozen=True)
class Failure:
    """Travels like `Feedback`: every rank goes exact at the same step. reason: for people."""

    reason: str
