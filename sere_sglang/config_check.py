"""What options may be together, and what those stand for that nobody gave."""

from __future__ import annotations

import dataclasses

from sere_sglang.config import quality_rules
from sere_sglang.errors import SereError, shown
from sere_sglang.names import AUTO, OWN_POLICIES, SIMILARITY
from sere_sglang.option import PREFIX, Option
from sere_sglang.options import OPTIONS, SereConfig


def checked(asked: SereConfig) -> SereConfig:
    """Validate what needs no model. Returns it; raises `SereError` naming the flag."""
    given = asked.given
    if not asked.enabled:
        ours = [option.flag for option in given if option.name.startswith(PREFIX)]
        if ours:
            raise SereError(
                f"{', '.join(ours)} given without --moe-backend sere: "
                "add --moe-backend sere, or drop the flag"
            )
        return asked
    for option in given:
        reason = option.fault(getattr(asked, option.name))
        if reason is not None:
            raise SereError(f"{option.flag} {_spelt(getattr(asked, option.name))}: {reason}")
        _check_rule(option, asked)
    _check_policy(asked)
    if asked.sere_max_kl is not None and not asked.sere_shadow:
        raise SereError(
            f"--sere-max-kl {asked.sere_max_kl:g} needs requests to judge by: add --sere-shadow "
            "RATE, the share of them that is scored again"
        )
    allowed = quality_rules(asked)
    if allowed.default not in allowed.allowed:
        raise SereError(
            f"--sere-quality {allowed.default} is not in --sere-allow-quality "
            f"{','.join(allowed.allowed)}"
        )
    low = asked.sere_min_batch or 1
    if asked.sere_max_batch is not None and asked.sere_max_batch < low:
        raise SereError(
            f"--sere-max-batch {asked.sere_max_batch} is below --sere-min-batch {low}: "
            "no batch would ever be re-routed"
        )
    return asked


def _check_rule(option: Option, asked: SereConfig) -> None:
    """Raise `SereError` for a flag that the rule does not look at."""
    if option.rules and asked.rule not in option.rules:
        raise SereError(
            f"{option.flag} is of --sere-rule {' and '.join(option.rules)}, not of {asked.rule}: "
            "change the rule or drop the flag"
        )


def _check_policy(asked: SereConfig) -> None:
    if asked.policy == "slo" and asked.sere_tpot_slo_ms is None:
        raise SereError("--sere-policy slo needs its target: add --sere-tpot-slo-ms MS")
    if asked.sere_tpot_slo_ms is not None and asked.policy != "slo":
        raise SereError(
            f"--sere-tpot-slo-ms is the target of --sere-policy slo, not of {asked.policy}: "
            "change the policy or drop the flag"
        )
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


def idle_flags(asked: SereConfig) -> list[str]:
    """Flags given that the policy does not look at, until an operator changes it. Other packages'
    policies look at what they like."""
    if asked.policy not in OWN_POLICIES:
        return []
    idle = [o.flag for o in asked.given if o.policies and asked.policy not in o.policies]
    no_budget = asked.policy == "static" and asked.rule not in ("energy", AUTO)
    if no_budget and asked.sere_quality_budget is not None:
        idle.append(OPTIONS["sere_quality_budget"].flag)
    return idle


def for_device(asked: SereConfig, device: str) -> SereConfig:
    """The default rule on SGLang's `device`: on a GPU what the others cost has not been measured,
    and one is served to those only who ask for it."""
    if device == "cpu" or asked.sere_rule is not None or asked.sere_surrogates:
        return asked
    return dataclasses.replace(asked, sere_rule=SIMILARITY)


def resolved(asked: SereConfig, *, top_k: int) -> SereConfig:
    """Fill every unset option for a model with `top_k` routed experts per token."""
    if top_k < 2:
        raise SereError("--moe-backend sere: top-1 routing has no secondary experts to skip")
    for option in OPTIONS.values():
        value = getattr(asked, option.name)
        if option.below_top_k and value is not None and value >= top_k:
            raise SereError(
                f"{option.flag} {value}: must be smaller than the model's "
                f"top-k ({top_k} routed experts per token), or nothing is ever re-routed"
            )
    unset = {
        option.name: option.default_of(asked, top_k)
        for option in OPTIONS.values()
        if getattr(asked, option.name) is None
    }
    # A policy that other flags imply is said by name from here on.
    named = {"sere_rule": asked.rule, "sere_policy": asked.policy}
    return dataclasses.replace(asked, **{**unset, **named})


def _spelt(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else shown(value).strip("'")
