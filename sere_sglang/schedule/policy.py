"""Policies: batch composition -> operating point. Pure functions of what every rank sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sere_sglang.errors import SereError
from sere_sglang.schedule.composition import BatchComposition


@dataclass(frozen=True)
class OperatingPoint:
    """What one forward runs at: S (`primary_k`) and rho (`threshold`), or nothing at all."""

    enabled: bool
    primary_k: int = 0
    threshold: float = 0.0


OFF = OperatingPoint(enabled=False)


@dataclass(frozen=True)
class Settings:
    """What a running server may be told; changed whole, between two steps, on every rank."""

    enabled: bool
    primary_k: int
    threshold: float
    min_batch: int
    max_batch: int | None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Settings:
        """From the live state that ``/server_info`` shows."""
        return cls(**{f.name: state[f.name] for f in dataclasses.fields(cls)})

    def updated(self, changes: Mapping[str, Any], *, top_k: int) -> Settings:
        """A validated copy; ``reset_counters`` is a command and passes through. Raises
        `SereError` naming the key; nothing is applied then."""
        if not isinstance(changes.get("reset_counters", True), bool):
            raise SereError(f"reset_counters must be true or false, got {changes!r}")
        changes = {key: value for key, value in changes.items() if key != "reset_counters"}
        known = {f.name for f in dataclasses.fields(self)}
        for key in changes:
            if key not in known:
                raise SereError(f"unknown key {key!r}; known: {', '.join(sorted(known))}")
        new = dataclasses.replace(self, **changes)
        if not isinstance(new.enabled, bool):
            raise SereError(f"enabled must be true or false, got {new.enabled!r}")
        _check_int("primary_k", new.primary_k, 1, top_k - 1)
        if isinstance(new.threshold, bool) or not isinstance(new.threshold, (int, float)):
            raise SereError(f"threshold must be a number, got {new.threshold!r}")
        if not 0.0 <= new.threshold <= 1.0:
            raise SereError(f"threshold must lie in [0, 1], got {new.threshold!r}")
        _check_int("min_batch", new.min_batch, 1, None)
        if new.max_batch is not None:
            _check_int("max_batch", new.max_batch, new.min_batch, None)
        return new


def static_policy(composition: BatchComposition, settings: Settings) -> OperatingPoint:
    """The published method: fixed S and rho on decode batches of the configured sizes."""
    rows = composition.num_tokens
    if (
        not settings.enabled
        or not composition.is_decode_like
        or rows < settings.min_batch
        or (settings.max_batch is not None and rows > settings.max_batch)
    ):
        return OFF
    return OperatingPoint(True, settings.primary_k, settings.threshold)


def _check_int(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SereError(f"{name} must be a whole number, got {value!r}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise SereError(f"{name} must be {bounds}, got {value}")
