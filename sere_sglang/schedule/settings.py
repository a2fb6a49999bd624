"""What an operator may change while the server runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sere_sglang.errors import SereError, shown
from sere_sglang.names import AUTO, SIMILARITY
from sere_sglang.option import fault
from sere_sglang.options import LIVE
from sere_sglang.schedule.auto_rule import RuleChoice

COMMANDS = ("reset_counters",)


@dataclass(frozen=True)
class Limits:
    """What the settings of one server may be.

    top_k: of its router. auto: the rule of that name. unavailable: rules that it does not have,
    with the reason. num_experts: of a layer, where known. surrogates: some layer has them.
    """

    top_k: int
    auto: RuleChoice
    unavailable: Mapping[str, str] = field(default_factory=dict)
    num_experts: int | None = None
    surrogates: bool = True

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Limits:
        """From the live state that ``/server_info`` shows."""
        return cls(
            state["top_k"],
            RuleChoice(**state["auto_rule"]),
            state["unavailable_rules"],
            state["num_experts"],
            state["has_surrogates"],
        )


@dataclass(frozen=True)
class Settings:
    """Changed whole, between two steps, on every rank: `enabled` and the options of `options.LIVE`,
    which say what each is and may be."""

    enabled: bool
    rule: str
    policy: str
    quality_budget: float
    tuned: bool
    min_gain: float
    tpot_slo_ms: float | None
    primary_k: int
    threshold: float
    max_experts: int | None
    min_batch: int
    max_batch: int | None
    fast_primary_k: int
    fast_threshold: float
    surrogates: bool
    shadow: float
    max_kl: float | None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Settings:
        """From the live state that ``/server_info`` shows."""
        return cls(**{f.name: state[f.name] for f in dataclasses.fields(cls)})

    def updated(self, changes: Mapping[str, Any], limits: Limits) -> Settings:
        """A validated copy; `COMMANDS` are not settings and pass through. Raises `SereError` naming
        the key; nothing is applied then."""
        for command in COMMANDS:
            _require(command, fault(changes.get(command, True), bool, None), changes)
        changes = {key: value for key, value in changes.items() if key not in COMMANDS}
        known = {f.name for f in dataclasses.fields(self)}
        for key in changes:
            if key not in known:
                every = ", ".join(sorted(known | set(COMMANDS)))
                raise SereError(f"unknown key {shown(key)}; known: {every}")
        if "quality_budget" in changes:  # who names a budget means that one
            changes.setdefault("tuned", False)
        if "rule" not in changes:
            changes |= self._rule_meant(changes)
        if changes.get("surrogates") is True and not (self.surrogates or limits.surrogates):
            raise SereError(
                "surrogates: this server's profile has none; calibrate with --surrogate-rank auto"
            )
        if changes.get("rule") == AUTO:  # who says surrogates too means that
            changes = {**limits.auto.settings, **changes, "rule": limits.auto.rule}
        new = dataclasses.replace(self, **changes)
        new.check(top_k=limits.top_k, num_experts=limits.num_experts)
        new.require_rule(limits.unavailable)
        return new

    def _rule_meant(self, changes: Mapping[str, Any]) -> dict[str, str]:
        """Who names S or rho, and no rule, means one that has it, as on the command line."""
        own = (LIVE[key].rules for key in changes if key in LIVE)
        foreign = any(SIMILARITY in rules and self.rule not in rules for rules in own)
        return {"rule": SIMILARITY} if foreign else {}

    def require_rule(self, unavailable: Mapping[str, str]) -> None:
        """Raise `SereError` if the rule is among those."""
        if self.rule in unavailable:
            raise SereError(f"rule {self.rule} cannot be had: {unavailable[self.rule]}")

    def check(self, *, top_k: int, num_experts: int | None = None) -> None:
        """Raise `SereError` naming the first key that is wrong. num_experts: where known."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        _require("enabled", fault(self.enabled, bool, None), values)
        for name, option in LIVE.items():
            if values[name] is not None or not option.nullable:
                _require(name, option.fault(values[name], top_k), values)
        if self.max_batch is not None and self.max_batch < self.min_batch:
            _require("max_batch", f"must be at least min_batch, {self.min_batch}", values)
        if num_experts is not None and (self.max_experts or 0) > num_experts:
            _require("max_experts", f"must be at most E={num_experts}, a layer's experts", values)
        if self.max_experts is None and self.policy == "static" and self.rule == "budget":
            raise SereError("rule budget under policy static needs max_experts, how many it loads")
        if self.tpot_slo_ms is None and self.policy == "slo":
            raise SereError("policy slo needs tpot_slo_ms, its target in milliseconds")
        if self.max_kl is not None and not self.shadow:
            raise SereError("max_kl needs shadow, the share of requests that are scored again")


def _require(name: str, reason: str | None, values: Mapping[str, Any]) -> None:
    if reason is not None:
        raise SereError(f"{name} {reason}, got {shown(values[name])}")
