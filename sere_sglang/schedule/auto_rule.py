"""What ``--sere-rule auto`` stands for: the best rule of a profile among those that can be had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sere_sglang.names import SIMILARITY
from sere_sglang.profile import SereProfile
from sere_sglang.profile.rule_errors import Candidate, energy_weights, overall

_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class RuleChoice:
    """surrogates: whether they are added. because: one line for people."""

    rule: str
    surrogates: bool
    because: str

    @property
    def settings(self) -> dict[str, Any]:
        """The live settings that it is. Under another rule than ``energy`` nobody asks about
        surrogates, so that setting stays as it is."""
        own = {"surrogates": self.surrogates} if self.rule == "energy" else {}
        return {"rule": self.rule, **own}

    @property
    def name(self) -> str:
        return str(Candidate(self.rule, self.surrogates))

    def __str__(self) -> str:
        return f"{self.name}, since {self.because}"


def choose_rule(
    profile: SereProfile,
    *,
    has_scores: bool = True,
    unavailable: Mapping[str, str] = _NOTHING,
    surrogates: bool = True,
) -> RuleChoice:
    """The one place that resolves ``auto``. There always is an answer.

    Args:
        has_scores: the model's routers expose their scores.
        unavailable: rule -> why it cannot be had here. ``similarity`` always can.
        surrogates: those of the profile may be added.
    """
    tables = profile.tables.values()
    surrogates = surrogates and any("surrogate_bias" in own for own in tables)
    # Measured with next-best experts, which a router without scores does not tell.
    fills = any(energy_weights(own).fill > 0 for own in tables)

    def can_be_had(candidate: Candidate) -> bool:
        if candidate.rule in unavailable or (candidate.surrogates and not surrogates):
            return False
        return has_scores or candidate != Candidate("energy") or not fills

    measured = {c: overall(errors) for c, errors in profile.rule_errors.items()}
    had = [candidate for candidate in measured if can_be_had(candidate)]
    if had:
        told = ", ".join(f"{candidate} {error:.3g}" for candidate, error in measured.items())
        missing = [str(candidate) for candidate in measured if candidate not in had]
        beside = f"; not to be had here: {', '.join(missing)}" if missing else ""
        because = f"it errs least on the profile's held-out text ({told}{beside})"
        return RuleChoice(*had[0], because)
    silent = "the profile does not compare the rules"
    if "energy" in unavailable:
        return RuleChoice(SIMILARITY, False, f"{silent} and energy: {unavailable['energy']}")
    if not has_scores:
        return RuleChoice(SIMILARITY, False, f"{silent} and the router exposes no scores")
    return RuleChoice("energy", surrogates, f"{silent} and the router exposes its scores")
