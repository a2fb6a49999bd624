"""Settings as numbers: how a change travels from the HTTP process to the schedulers.

SGLang types ``SetInternalStateReq`` as numbers only. This encoding is for that way alone: what
arrives from outside is the nested object (patches/http_server.py), and a scheduler takes nothing
that `flatten` does not write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sere_sglang.errors import SereError, shown
from sere_sglang.options import LIVE
from sere_sglang.schedule.settings import COMMANDS, Settings
from sere_sglang.schedule.shadow import REPORT

PREFIX = "sere."
STOP = "stop"
"""A command from the HTTP process itself, which nobody else may send: re-routing ends. Nor may
anybody else send the numbers of a `schedule.shadow.REPORT`."""

_WIDEST = 1 << 64  # of what arrives; Python's whole numbers have no end
_NONE = -1  # of the settings that may be null; they are positive otherwise
_NULLABLE = {name for name, option in LIVE.items() if option.nullable}
_BOOLEAN = {"enabled", *COMMANDS, STOP} | {n for n, option in LIVE.items() if option.base is bool}
_WHOLE = {n for n, option in LIVE.items() if option.base is int}
_WHOLE |= {name for name, whole in REPORT.items() if whole}
_WORDS = {name for name, option in LIVE.items() if option.base is str}
_KNOWN = frozenset(f.name for f in dataclasses.fields(Settings)) | {*COMMANDS, STOP, *REPORT}


def flatten(changes: Mapping[str, Any]) -> dict[str, float]:
    """`{"primary_k": 2}` -> `{"sere.primary_k": 2}`; booleans become 0 or 1, null becomes -1, a
    policy or rule its place among their names, which are the same in every process."""
    numbers = dict(changes)
    for key in _WORDS & numbers.keys():
        numbers[key] = LIVE[key].names.index(numbers[key])
    return {PREFIX + k: _NONE if v is None else v + 0 for k, v in numbers.items()}


def unflatten(server_args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a request's keys into (ours in their own types, everything else). Raises `SereError`
    for what `flatten` would not have written."""
    ours: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in server_args.items():
        if key.startswith(PREFIX):
            name = key.removeprefix(PREFIX)
            ours[name] = _decoded(name, value)
        else:
            rest[key] = value
    return ours, rest


def _decoded(name: str, value: Any) -> Any:
    if name not in _KNOWN:
        raise SereError(f"unknown key {shown(PREFIX + name)}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (-_WIDEST <= value <= _WIDEST):  # false for NaN too
        raise SereError(f"{PREFIX}{name} is not a number: {shown(value)}")
    if name in _BOOLEAN:
        return bool(_among(name, value, 2))
    if name in _WORDS:
        names = LIVE[name].names
        return names[_among(name, value, len(names))]
    if name in _NULLABLE and value == _NONE:
        return None
    # JSON and msgpack may have made 2.0 of a 2; whatever else is wrong `Settings.check` sees.
    return int(value) if name in _WHOLE and float(value).is_integer() else value


def _among(name: str, value: float, count: int) -> int:
    if value not in range(count):
        raise SereError(f"{PREFIX}{name} must be a whole number below {count}, got {shown(value)}")
    return int(value)
