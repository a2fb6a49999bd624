"""What options may be together, and what those stand for that nobody gave."""

from __future__ import annotations

import dataclasses
from typing import Any

from sere_sglang.config import (
    AUTO_RULE,
    BACKENDS,
    DEFAULT_MIN_GAIN,
    DEFAULT_QUALITY_BUDGET,
    ON_ERROR,
    SereConfig,
    flag_of,
)
from sere_sglang.errors import SereError
from sere_sglang.schedule.names import policy_names
from sere_sglang.schedule.point import RULES, SIMILARITY
from sere_sglang.schedule.request_quality import QUALITIES

_OF_RULES = {
    "sere_primary_k": (SIMILARITY, "piggyback", "topk"),
    "sere_threshold": (SIMILARITY,),
    "sere_fast_threshold": (SIMILARITY,),
    "sere_scale": (SIMILARITY,),
    "sere_max_experts": ("budget",),
    "sere_surrogates": ("energy",),
}
"""Options that only some rules look at."""


def checked(asked: SereConfig) -> SereConfig:
    """Validate what needs no model. Returns it; raises `SereError` naming the flag."""
    if not asked.enabled:
        given = [flag_of(f.name) for f in _sere_fields() if getattr(asked, f.name) is not None]
        if given:
            raise SereError(
                f"{', '.join(given)} given without --moe-backend sere: "
                "add --moe-backend sere, or drop the flag"
            )
        return asked
    _check_choice("moe_backend", asked.moe_backend, BACKENDS)
    _check_choice("sere_policy", asked.sere_policy, policy_names())
    _check_choice("sere_rule", asked.sere_rule, (*RULES, AUTO_RULE))
    _check_choice("sere_surrogates", asked.sere_surrogates, ("on", "off"))
    _check_choice("sere_on_error", asked.sere_on_error, ON_ERROR)
    _check_choice("sere_quality", asked.sere_quality, QUALITIES)
    for name in ("sere_primary_k", "sere_fast_primary_k"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise SereError(
                f"{flag_of(name)} {value}: must be at least 1 and smaller than the model's top-k"
            )
    for name in ("sere_threshold", "sere_fast_threshold"):
        value = getattr(asked, name)
        if value is not None and not 0.0 <= value <= 1.0:
            raise SereError(
                f"{flag_of(name)} {value:g}: similarities lie in [0, 1], so must the threshold"
            )
    for name in ("sere_quality_budget", "sere_min_gain"):
        value = getattr(asked, name)
        if value is not None and not 0.0 <= value <= 1.0:
            raise SereError(f"{flag_of(name)} {value:g}: must lie in [0, 1]")
    if asked.sere_tpot_slo_ms is not None and not asked.sere_tpot_slo_ms > 0:
        raise SereError(f"--sere-tpot-slo-ms {asked.sere_tpot_slo_ms:g}: must be positive")
    if asked.sere_policy == "slo" and asked.sere_tpot_slo_ms is None:
        raise SereError("--sere-policy slo needs its target: add --sere-tpot-slo-ms MS")
    if asked.sere_tpot_slo_ms is not None and asked.policy != "slo":
        raise SereError(
            f"--sere-tpot-slo-ms is the target of --sere-policy slo, not of {asked.policy}: "
            "change the policy or drop the flag"
        )
    _check_rule(asked)
    allowed = asked.quality_rules()
    if allowed.default not in allowed.allowed:
        raise SereError(
            f"--sere-quality {allowed.default} is not in --sere-allow-quality "
            f"{','.join(allowed.allowed)}"
        )
    low = 1 if asked.sere_min_batch is None else asked.sere_min_batch
    if low < 1:
        raise SereError(f"--sere-min-batch {low}: must be at least 1")
    if asked.sere_max_batch is not None and asked.sere_max_batch < low:
        raise SereError(
            f"--sere-max-batch {asked.sere_max_batch} is below --sere-min-batch {low}: "
            "no batch would ever be re-routed"
        )
    return asked


def _check_rule(asked: SereConfig) -> None:
    """Raise `SereError` for a flag that the rule does not look at."""
    for name, rules in _OF_RULES.items():
        if getattr(asked, name) is not None and asked.rule not in rules:
            raise SereError(
                f"{flag_of(name)} is of --sere-rule {' and '.join(rules)}, not of {asked.rule}: "
                "change the rule or drop the flag"
            )
    if asked.sere_max_experts is not None and asked.sere_max_experts < 1:
        raise SereError(f"--sere-max-experts {asked.sere_max_experts}: must be at least 1")
    if asked.rule == "budget" and asked.policy == "static" and asked.sere_max_experts is None:
        raise SereError(
            "--sere-rule budget with --sere-policy static needs --sere-max-experts B; without "
            "a policy, adaptive chooses it"
        )
    if asked.sere_max_experts is not None and asked.policy != "static":
        raise SereError(
            f"--sere-max-experts is of --sere-policy static, {asked.policy} chooses it itself: "
            "change the policy or drop the flag"
        )


def resolved(asked: SereConfig, *, top_k: int) -> SereConfig:
    """Fill every unset option for a model with `top_k` routed experts per token."""
    for name in ("sere_primary_k", "sere_fast_primary_k"):
        value = getattr(asked, name)
        if value is not None and value >= top_k:
            raise SereError(
                f"{flag_of(name)} {value}: must be smaller than the model's "
                f"top-k ({top_k} routed experts per token), or nothing is ever re-routed"
            )
    defaults: dict[str, Any] = {
        "sere_rule": asked.rule,
        "sere_surrogates": "on",
        "sere_policy": asked.policy,
        "sere_primary_k": max(1, top_k // 2),
        "sere_threshold": 0.0,
        "sere_quality_budget": DEFAULT_QUALITY_BUDGET,
        "sere_min_gain": DEFAULT_MIN_GAIN,
        "sere_quality": "balanced",
        "sere_allow_quality": ",".join(QUALITIES),
        "sere_fast_primary_k": 1,
        "sere_fast_threshold": 0.0,
        # A batch of one or two has hardly any experts to stand in for others.
        "sere_min_batch": 1 if asked.policy == "static" else 3,
        "sere_on_error": "exit",
    }
    unset = {name: v for name, v in defaults.items() if getattr(asked, name) is None}
    if top_k < 2:
        raise SereError("--moe-backend sere: top-1 routing has no secondary experts to skip")
    return dataclasses.replace(asked, **unset)


def _sere_fields() -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(SereConfig) if f.name.startswith("sere_")]


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise SereError(f"{flag_of(name)} {value}: choose from {', '.join(choices)}")
