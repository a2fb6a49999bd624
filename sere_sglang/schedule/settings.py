"""What an operator may change while the server runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sere_sglang.errors import SereError, shown
from sere_sglang.schedule.names import policy_names
from sere_sglang.schedule.point import RULES, SIMILARITY

COMMANDS = ("reset_counters",)
MOST_ROWS = (1 << 31) - 1  # of a batch
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Settings:
    """Changed whole, between two steps, on every rank.

    quality_budget: expected loss of a re-routed batch, in [0, 1], that ``adaptive`` may spend
        and ``slo`` at most.
    min_gain: predicted gain in step time below which a batch is left alone.
    tpot_slo_ms: target of ``slo``; None for the other policies.
    fast_primary_k, fast_threshold: operating point of rows that asked to be fast.
    rule: of `point.RULES`. max_experts: B of ``static`` under rule ``budget``.
    surrogates: whether lost slots get those of the profile, if it has any, under ``energy``.
    """

    enabled: bool
    policy: str
    primary_k: int
    threshold: float
    min_batch: int
    max_batch: int | None
    quality_budget: float
    min_gain: float
    tpot_slo_ms: float | None
    fast_primary_k: int
    fast_threshold: float
    rule: str = SIMILARITY
    max_experts: int | None = None
    surrogates: bool = True

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Settings:
        """From the live state that ``/server_info`` shows."""
        return cls(**{f.name: state[f.name] for f in dataclasses.fields(cls)})

    def updated(
        self, changes: Mapping[str, Any], *, top_k: int, unavailable: Mapping[str, str] = _NOTHING
    ) -> Settings:
        """A validated copy; `COMMANDS` are not settings and pass through. unavailable: rules that
        this server does not have, with the reason. Raises `SereError` naming the key; nothing is
        applied then."""
        for command in COMMANDS:
            if not isinstance(changes.get(command, True), bool):
                raise SereError(f"{command} must be true or false, got {shown(changes[command])}")
        changes = {key: value for key, value in changes.items() if key not in COMMANDS}
        known = {f.name for f in dataclasses.fields(self)}
        for key in changes:
            if key not in known:
                every = ", ".join(sorted(known | set(COMMANDS)))
                raise SereError(f"unknown key {shown(key)}; known: {every}")
        new = dataclasses.replace(self, **changes)
        new.check(top_k=top_k)
        new.require_rule(unavailable)
        return new

    def require_rule(self, unavailable: Mapping[str, str]) -> None:
        """Raise `SereError` if the rule is among those."""
        if self.rule in unavailable:
            raise SereError(f"rule {self.rule} cannot be had: {unavailable[self.rule]}")

    def check(self, *, top_k: int) -> None:
        """Raise `SereError` naming the first key that is wrong."""
        for name in ("enabled", "surrogates"):
            if not isinstance(getattr(self, name), bool):
                raise SereError(f"{name} must be true or false, got {shown(getattr(self, name))}")
        if self.rule not in RULES:
            raise SereError(f"rule must be one of {', '.join(RULES)}, got {shown(self.rule)}")
        if self.policy not in policy_names():
            raise SereError(
                f"policy must be one of {', '.join(policy_names())}, got {shown(self.policy)}"
            )
        _check_int("primary_k", self.primary_k, 1, top_k - 1)
        _check_int("fast_primary_k", self.fast_primary_k, 1, top_k - 1)
        _check_int("min_batch", self.min_batch, 1, MOST_ROWS)
        if self.max_batch is not None:
            _check_int("max_batch", self.max_batch, self.min_batch, MOST_ROWS)
        for name in ("threshold", "fast_threshold", "quality_budget", "min_gain"):
            _check_number(name, getattr(self, name), 0.0, 1.0)
        if self.tpot_slo_ms is not None:
            _check_number("tpot_slo_ms", self.tpot_slo_ms, 0.01, 1e6)
        if self.max_experts is not None:
            _check_int("max_experts", self.max_experts, 1, MOST_ROWS)
        elif self.policy == "static" and self.rule == "budget":
            raise SereError("rule budget under policy static needs max_experts, how many it loads")
        if self.tpot_slo_ms is None and self.policy == "slo":
            raise SereError("policy slo needs tpot_slo_ms, its target in milliseconds")


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SereError(f"{name} must be a whole number, got {shown(value)}")
    if not low <= value <= high:
        bounds = f"at least {low}" if high == MOST_ROWS and value < low else f"in [{low}, {high}]"
        raise SereError(f"{name} must be {bounds}, got {shown(value)}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SereError(f"{name} must be a number, got {shown(value)}")
    if not low <= value <= high:
        raise SereError(f"{name} must lie in [{low:g}, {high:g}], got {shown(value)}")
