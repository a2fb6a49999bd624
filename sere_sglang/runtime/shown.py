"""What a rank shows of itself: in ``/server_info``, and at the end of SGLang's decode log line."""

from __future__ import annotations

import dataclasses
from typing import Any

from sere_sglang.runtime.counters import FIELDS, LOSS_UNIT
from sere_sglang.runtime.rank import SereRuntime
from sere_sglang.schedule.cost_file import describe as describe_cost
from sere_sglang.schedule.feedback import NO_FEEDBACK


def constants(active: SereRuntime) -> dict[str, Any]:
    """What does not change while the server runs."""
    binding, context = active.binding, active.context
    return {
        "profile": active.config.sere_profile,
        "cost": describe_cost(context.cost),
        "layers": binding.layer_ids,
        "kernel": binding.impl,
        "distinct_rows": all(stage.distinct for stage in binding.stages),
        "surrogate_bytes": {
            str(stage.layer_id): stage.rules.surrogates.num_bytes
            for stage in binding.stages
            if stage.rules is not None and stage.rules.surrogates is not None
        },
        "tuning": {
            rule: [{"batch": batch, "budget": budget} for batch, budget in rows]
            for rule, rows in context.tuning.rows.items()
        },
        "quality": active.quality_rules.default,
        "allowed_quality": list(active.quality_rules.allowed),
    }


def state(active: SereRuntime) -> dict[str, Any]:
    """Live state: settings, the last operating point, counters since start or reset."""
    return {
        **essential_state(active),
        "composition": None if active.last is None else dataclasses.asdict(active.last),
        "feedback": dataclasses.asdict(active.feedback),
        "budget": active.budget(),
        "step_ms": active.measuring.clock.step_ms,
        "predicted_step_ms": active.predicted_ms(),
        "unavailable_rules": dict(active.binding.unavailable),
        "counters": _counters(active),
    }


def essential_state(active: SereRuntime) -> dict[str, Any]:
    """`state` without what may have failed, in the same form."""
    return {
        **dataclasses.asdict(active.settings),
        "top_k": active.top_k,
        "num_experts": active.binding.num_experts,
        "has_surrogates": active.binding.has_surrogates,
        "auto_rule": dataclasses.asdict(active.binding.auto),
        "failed": active.health.failed or active.health.trouble,
        "braked": active.brake.pulled,
        "shadow_report": None
        if active.brake.report is None
        else dataclasses.asdict(active.brake.report),
        "operating_point": active.point.describe(),
        "composition": None,
        "feedback": dataclasses.asdict(NO_FEEDBACK),
        "budget": None,
        "step_ms": None,
        "predicted_step_ms": None,
        "unavailable_rules": {},
        "counters": {},
    }


def log_line(active: SereRuntime) -> str:
    if active.health.trouble is not None:
        return "sere: failed, exact"
    text, window = f"sere: {active.point}", active.measuring.window
    if window is None or not active.point.enabled:
        return text
    before, after = window.active_before.mean(), window.active_after.mean()
    return f"{text}, active experts: {before:.1f} -> {after:.1f} ({window.forwards} steps)"


def _counters(active: SereRuntime) -> dict[str, dict[str, float]]:
    """By layer; loss in shares of the square of a row's routing weight, summed over forwards."""
    shown: dict[str, dict[str, float]] = {}
    active.binding.settle()
    rows, masses = active.binding.counters.tolist(), active.binding.loss_unit
    for layer, row, mass in zip(active.binding.layer_ids, rows, masses, strict=True):
        own: dict[str, float] = dict(zip(FIELDS, row, strict=True))
        shown[str(layer)] = own | {"loss": own["loss"] * LOSS_UNIT / mass}
    return shown
