"""Seam: route ``/set_internal_state`` of SGLang's HTTP server.

SGLang types its body as numbers only, over HTTP and on the way to the schedulers. Ours takes the
nested object ``{"server_args": {"sere": {...}}}``, checks it against the live settings so that a
wrong one is told why, and sends it on as numbers (patches/number_keys.py).
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from sere_sglang.errors import SereError, cut, shown
from sere_sglang.patches import guard, shadow
from sere_sglang.patches.number_keys import PREFIX, STOP, flatten
from sere_sglang.patches.seam import SeamError, resolve
from sere_sglang.schedule.settings import Limits, Settings

_MODULE = "sglang.srt.entrypoints.http_server"
_PATH = "/set_internal_state"
_REQUEST = "sglang.srt.managers.io_struct.SetInternalStateReq"
_KEY = "sere"
_FORM = 'expected {"server_args": {"sere": {...}}}'
_tasks: set[asyncio.Task[Any]] = set()
_WIDEST = 1 << 63  # numbers travel on in 64 bits


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


def _endpoint() -> Any:
    from fastapi import Request
    from fastapi.responses import JSONResponse

    request_type = resolve(_REQUEST)
    server = sys.modules[_MODULE]

    one_change = asyncio.Lock()  # what is checked is still so when it is changed

    async def set_internal_state(request: Request) -> Any:
        body = await request.body()
        async with one_change:
            return await change(body)

    async def change(body: bytes) -> Any:
        manager = server._global_state.tokenizer_manager  # type: ignore[attr-defined]
        try:
            numbers, asked = parse(body)
            if asked is not None:
                states = await manager.get_internal_state()
                for state in states:
                    check(asked, state["sere"])
                if asked.get("shadow"):
                    shadow.require_supported(manager.server_args)
                numbers |= flatten(asked)
        except SereError as error:
            return JSONResponse({"error": {"message": str(error), "code": 400}}, status_code=400)
        theirs = sorted(key for key in numbers if not key.startswith(PREFIX))
        answer = await manager.set_internal_state(request_type(server_args=numbers))
        if asked is not None and not all(answer):
            reason = "settings changed meanwhile, or SERE has failed (/server_info has why)"
            if theirs:
                reason = f"SGLang refuses {', '.join(map(shown, theirs))}"
            message = f"{reason}; nothing was applied"
            return JSONResponse({"error": {"message": message, "code": 400}}, status_code=400)
        if asked is not None and all(answer):
            await shadow.follow(asked)
            if asked.get("enabled") is True:
                guard.launcher_starts_again()
        return answer

    # The module's annotations are strings, which FastAPI would look up among its globals.
    set_internal_state.__annotations__["request"] = Request
    return set_internal_state


def parse(body: bytes) -> tuple[dict[str, float], Any]:
    """(SGLang's own keys, what is asked of SERE or None) of a request's body. Raises `SereError`.

    Our encoding between processes is no entrance: keys that look like it are refused.
    """
    try:
        content = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise SereError(f"the body is nested too deeply; {_FORM}") from None
    except SereError:
        raise
    except ValueError as error:
        raise SereError(f"the body is no JSON ({cut(str(error))}); {_FORM}") from None
    server_args = content.get("server_args") if isinstance(content, dict) else None
    if not isinstance(server_args, dict):
        raise SereError(_FORM)
    asked = None
    numbers: dict[str, float] = {}
    for key, value in server_args.items():
        if key == _KEY:
            asked = value
            if not isinstance(asked, dict):
                raise SereError(_not_an_object(asked))
        elif key.strip().lower().startswith(_KEY):
            name = key.strip()[len(PREFIX) :] or "..."
            raise SereError(
                f"unknown key {shown(key)}: settings of SERE go into one object, "
                f'{{"server_args": {{"sere": {{{json.dumps(cut(name))}: ...}}}}}}'
            )
        else:
            numbers[key] = _number(key, value)
    return numbers, asked


def check(asked: Any, state: Mapping[str, Any]) -> None:
    """Raise `SereError` unless `asked` is a valid change of the live `state`."""
    if not isinstance(asked, Mapping):
        raise SereError(_not_an_object(asked))
    try:
        Settings.from_state(state).updated(asked, Limits.from_state(state))
    except SereError as error:
        raise SereError(f"sere: {error}") from None


def stop(manager: Any) -> None:
    """End re-routing on all ranks, on behalf of the process of SGLang's `manager` itself."""
    request = resolve(_REQUEST)(server_args=flatten({STOP: True}))
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # between two calls of an offline Engine: nothing was routed by it
        return
    task = loop.create_task(manager.set_internal_state(request))
    _tasks.add(task)  # asyncio itself keeps no reference
    task.add_done_callback(_tasks.discard)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SereError(f"{shown(key)} must be a number, got {shown(value)}")
    if not (math.isfinite(value) if isinstance(value, float) else -_WIDEST <= value < _WIDEST):
        raise SereError(f"{shown(key)} is too large: {shown(value)}")
    return value


def _no_constant(name: str) -> NoReturn:
    raise SereError(f"{name} is not a number that JSON knows; give a finite one")


def _not_an_object(asked: Any) -> str:
    return f'sere: expected an object, for instance {{"primary_k": 2}}, got {shown(asked)}'
