"""Ways to route, by the names that tables and ``--points`` have for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sere_sglang.errors import SereError, shown
from sere_sglang.names import AUTO as AUTO_RULE
from sere_sglang.schedule.auto_rule import RuleChoice

FORMS = (
    "S=2 or S=2/0.5 (with rho), adaptive or adaptive@0.05 (with its quality budget), auto or "
    "auto@0.05, energy=0.05, piggyback=2, topk=2, budget=12"
)

_NUMBER = r"\d*\.?\d+"


@dataclass(frozen=True)
class Routing:
    """One way to route: its name in tables, which tells it, and the live settings that make it
    (None: plain SGLang)."""

    name: str
    settings: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def server(self) -> str:
        return "plain" if self.settings is None else "sere"

    @property
    def reroutes(self) -> bool:
        return self.settings is not None and self.settings["enabled"]

    def under(self, auto: RuleChoice) -> Routing:
        """The same, where it asks for rule ``auto``, with what that is on a server."""
        if self.settings is None or self.settings.get("rule") != AUTO_RULE:
            return self
        return Routing(self.name, {**self.settings, **auto.settings})

    def over(self, base: Mapping[str, Any]) -> Routing:
        """The same with every setting it leaves open as in `base`."""
        return self if self.settings is None else Routing(self.name, {**base, **self.settings})


PLAIN = Routing("plain")
OFF = Routing("off", {"enabled": False})
_ADAPTIVE = {"enabled": True, "policy": "adaptive", "min_batch": 3}
ADAPTIVE = Routing("adaptive", _ADAPTIVE | {"rule": "similarity"})
AUTO = Routing("auto", _ADAPTIVE | {"rule": AUTO_RULE})
"""The adaptive policy at the server's budget, under SERE's rule and under --sere-rule auto."""


def static(primary_k: int) -> Routing:
    """The published method at this S, with rho = 0."""
    return Routing(f"S={primary_k}", static_settings(primary_k))


def static_settings(primary_k: int) -> dict[str, Any]:
    """The live settings that make a server `static`."""
    settings = {"policy": "static", "primary_k": primary_k, "threshold": 0.0, "min_batch": 1}
    return {"enabled": True, "rule": "similarity", **settings}


def counted_exactly(top_k: int) -> dict[str, Any]:
    """Exact routing that counters see: a threshold of 1 moves nothing but exact twins."""
    return static_settings(top_k - 1) | {"threshold": 1.0}


def routing_of(name: str, flag: str = "--points") -> Routing:
    """The routing that `name` (of `FORMS`) stands for. Raises `SereError` naming `flag`."""
    if name == "off":
        return OFF
    if re.fullmatch(r"(S|piggyback|topk|budget)=0+(/.*)?", name):
        raise SereError(f"{flag} {shown(name)}: a point has 1 at least; write {FORMS}")
    if found := re.fullmatch(rf"S=(\d+)(?:/({_NUMBER}))?", name):
        settings = static_settings(int(found[1]))
        return Routing(name, settings | {"threshold": float(found[2] or 0.0)})
    if found := re.fullmatch(rf"(adaptive|auto)(?:@({_NUMBER}))?", name):
        settings = dict((ADAPTIVE if found[1] == "adaptive" else AUTO).settings or {})
        named = {"quality_budget": float(found[2]), "tuned": False} if found[2] else {}
        return Routing(name, settings | named)
    if found := re.fullmatch(r"(piggyback|topk)=(\d+)", name):
        return Routing(name, static_settings(int(found[2])) | {"rule": found[1]})
    if found := re.fullmatch(r"budget=(\d+)", name):
        return Routing(name, static_settings(1) | {"rule": "budget", "max_experts": int(found[1])})
    if found := re.fullmatch(rf"energy=({_NUMBER})", name):
        return Routing(
            name, static_settings(1) | {"rule": "energy", "quality_budget": float(found[1])}
        )
    raise SereError(f"{flag} {shown(name)}: no such operating point; write {FORMS}")
