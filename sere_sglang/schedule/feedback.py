"""What one rank measured and all ranks know: the only road from a clock to a decision."""

from __future__ import annotations

from dataclasses import dataclass, field

from sere_sglang.schedule.cost import MoeCost, StepModel


@dataclass(frozen=True)
class Feedback:
    """Sent by the rank that receives requests, applied by every rank at the same step.

    step: what decode steps take; what the MoE layers were timed to take until some were measured.
    step_ms: smoothed time of the last steps; None before there is one.
    budget: expected loss that ``slo`` allows at present; None before it has decided.
    """

    step: StepModel = field(default_factory=StepModel)
    step_ms: float | None = None
    budget: float | None = None


NO_FEEDBACK = Feedback()


def first_feedback(cost: MoeCost) -> Feedback:
    """Before anything was measured."""
    return NO_FEEDBACK if cost.step is None else Feedback(step=cost.step)
