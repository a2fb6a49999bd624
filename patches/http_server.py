"""Seam: route ``/set_internal_state`` of SGLang's HTTP server (0.5.19 - 0.5.23).

SGLang types its body as numbers only, over HTTP and on the way to the schedulers. Ours takes the
nested object ``{"server_args": {"sere": {...}}}``, checks it against the live settings so that a
wrong one is told why, and sends it on as numbers (`flatten` / `unflatten`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from sere_sglang.errors import SereError
from sere_sglang.patches.seam import SeamError, resolve
from sere_sglang.schedule.policy import policy_names
from sere_sglang.schedule.settings import COMMANDS, Settings

_MODULE = "sglang.srt.entrypoints.http_server"
_PATH = "/set_internal_state"
_PREFIX = "sere."
_NONE = -1  # of the settings that may be null; they are positive otherwise
_OPTIONAL = ("max_batch", "tpot_slo_ms")
_FLAGS = ("enabled", *COMMANDS)
_WHOLE = ("primary_k", "fast_primary_k", "min_batch", "max_batch")


def install() -> None:
    """In the launcher, before it serves. An offline ``Engine`` has no HTTP server."""
    if _MODULE not in sys.modules:
        return
    app = resolve(f"{_MODULE}.app")
    routes = [r for r in app.router.routes if getattr(r, "path", None) == _PATH]
    if len(routes) != 1:
        raise SeamError(f"{_MODULE}: {len(routes)} routes for {_PATH}, expected one")
    if getattr(routes[0].endpoint, "_sere", False):
        return
    app.router.routes.remove(routes[0])
    auth_level = resolve("sglang.srt.utils.auth.auth_level")
    level = resolve("sglang.srt.utils.auth.AuthLevel").ADMIN_OPTIONAL
    endpoint = auth_level(level)(_endpoint())
    endpoint._sere = True
    app.api_route(_PATH, methods=["POST", "PUT"])(endpoint)


def flatten(changes: Mapping[str, Any]) -> dict[str, float]:
    """`{"primary_k": 2}` -> `{"sere.primary_k": 2}`; booleans become 0 or 1, null becomes -1, a
    policy its place among `policy_names`, which are the same in every process."""
    numbers = dict(changes)
    if "policy" in numbers:
        numbers["policy"] = policy_names().index(numbers["policy"])
    return {_PREFIX + k: _NONE if v is None else v + 0 for k, v in numbers.items()}


def unflatten(server_args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a request's keys into (ours in their own types, everything else)."""
    ours: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in server_args.items():
        name = key.removeprefix(_PREFIX)
        if name == key:
            rest[key] = value
        elif name in _FLAGS:
            ours[name] = bool(value)
        elif name == "policy":
            ours[name] = policy_names()[int(value)]
        elif name in _OPTIONAL and value == _NONE:
            ours[name] = None
        elif name in _WHOLE and float(value).is_integer():
            ours[name] = int(value)
        else:
            ours[name] = value
    return ours, rest


def _endpoint() -> Any:
    from fastapi import Request
    from fastapi.responses import JSONResponse

    request_type = resolve("sglang.srt.managers.io_struct.SetInternalStateReq")
    server = sys.modules[_MODULE]

    async def set_internal_state(request: Request) -> Any:
        manager = server._global_state.tokenizer_manager  # type: ignore[attr-defined]
        try:
            body = await request.json()
            server_args = body["server_args"]
            asked = server_args.pop("sere", None)
            numbers = {str(key): value + 0 for key, value in server_args.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return _refuse('expected {"server_args": {"sere": {...}}}, every other key a number')
        if asked is not None:
            states = await manager.get_internal_state()
            try:
                check(asked, states[0]["sere"])
            except SereError as error:
                return _refuse(f"sere: {error}")
            numbers |= flatten(asked)
        return await manager.set_internal_state(request_type(server_args=numbers))

    def _refuse(message: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "code": 400}}, status_code=400)

    # The module's annotations are strings, which FastAPI would look up among its globals.
    set_internal_state.__annotations__["request"] = Request
    return set_internal_state


def check(asked: Any, state: Mapping[str, Any]) -> None:
    """Raise `SereError` unless `asked` is a valid change of the live `state`."""
    if not isinstance(asked, Mapping):
        raise SereError('expected an object, for instance {"sere": {"primary_k": 2}}')
    Settings.from_state(state).updated(asked, top_k=state["top_k"])
