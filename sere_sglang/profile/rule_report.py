"""Which rule errs least in each layer, for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sere_sglang.profile.file import SereProfile
from sere_sglang.profile.rule_errors import CANDIDATES, energy_weights, rule_errors


@dataclass(frozen=True)
class RuleReport:
    """One layer. errors: of every candidate that it was measured under, best first: geometric mean
    over batch sizes and degrees. fill, renormalize, compensation: `EnergyWeights`."""

    layer: int
    errors: dict[str, float]
    fill: float
    renormalize: float
    compensation: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rule_reports(profile: SereProfile) -> list[RuleReport]:
    """Of every layer that was measured."""
    reports = []
    for layer, tables in profile.tables.items():
        errors = {str(c): own[layer] for c, own in rule_errors({layer: tables}).items()}
        if errors:
            reports.append(RuleReport(layer, errors, *energy_weights(tables)))
    return reports


NAMES = tuple(map(str, CANDIDATES))
