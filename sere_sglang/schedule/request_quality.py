"""What a single request may ask for: ``custom_params: {"sere": "exact" | "balanced" | "fast"}``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sere_sglang.errors import SereError, shown
from sere_sglang.names import QUALITIES, RowClass

KEY = "sere"


@dataclass(frozen=True)
class QualityRules:
    """The operator's part: what a request that does not ask gets, and what it may ask for."""

    default: str = "balanced"
    allowed: tuple[str, ...] = QUALITIES

    def check(self, custom_params: Any) -> None:
        """Raise `SereError` with the reason when a request may not have what it asks for."""
        if custom_params is None:
            return
        if not isinstance(custom_params, dict):
            raise SereError(
                f'custom_params must be an object, for instance {{"{KEY}": "exact"}}, got '
                f"{shown(custom_params)}"
            )
        for key in custom_params:
            if key != KEY and str(key).strip().lower() == KEY:
                raise SereError(f'custom_params {shown(key)}: write "{KEY}"')
        asked = custom_params.get(KEY)
        if asked is None:
            return
        if not isinstance(asked, str) or asked not in QUALITIES:
            raise SereError(
                f'custom_params "{KEY}" must be one of {_listed(QUALITIES)}: {shown(asked)}'
            )
        if asked not in self.allowed:
            raise SereError(
                f'custom_params "{KEY}": {asked!r} is not allowed on this server '
                f"(--sere-allow-quality {','.join(self.allowed)})"
            )

    def class_of(self, custom_params: Any) -> RowClass:
        """The row class of a request; whatever `check` would refuse counts as not asked for."""
        asked = custom_params.get(KEY) if isinstance(custom_params, dict) else None
        return RowClass[(asked if asked in self.allowed else self.default).upper()]


def row_classes(request_classes: Sequence[int], rows_per_request: int) -> bytes:
    """One byte per row of a decode or verify batch; empty when every row is balanced."""
    if not any(request_classes):
        return b""
    if rows_per_request == 1:
        return bytes(request_classes)
    return bytes(c for c in request_classes for _ in range(rows_per_request))


def parse_allowed(text: str) -> tuple[str, ...]:
    """``exact,balanced`` -> in the order of `QUALITIES`; raises `SereError`."""
    names = {part.strip() for part in text.split(",") if part.strip()}
    unknown = sorted(names - set(QUALITIES))
    if unknown or not names:
        raise SereError(
            f"--sere-allow-quality {text}: expected a comma-separated list of {_listed(QUALITIES)}"
        )
    return tuple(name for name in QUALITIES if name in names)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
