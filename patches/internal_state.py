"""Seam: ``SchedulerInternalStateController`` (0.5.19 - 0.5.23): readback and live control.

``get_internal_state`` is what ``/server_info`` shows per rank group; ``set_internal_state``
receives what SGLang broadcasts to every rank between two steps (see patches/http_server.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang import runtime
from sere_sglang.errors import SereError
from sere_sglang.patches.http_server import unflatten
from sere_sglang.patches.seam import hook, resolve

logger = logging.getLogger(__name__)

_MODULE = "sglang.srt.managers.scheduler_components.internal_state"
_TARGET = f"{_MODULE}.SchedulerInternalStateController"


def install() -> None:
    hook(f"{_TARGET}.get_internal_state", _add_state, HookType.AFTER)
    hook(f"{_TARGET}.set_internal_state", _set_state, HookType.AROUND, needs=["recv_req"])


def _add_state(result: Any, *_args: Any) -> None:
    active = runtime.current()
    if active is not None:
        result.internal_state["sere"] = active.state()


def _set_state(original: Callable[..., Any], controller: Any, recv_req: Any) -> Any:
    ours, rest = unflatten(recv_req.server_args)
    active = runtime.current()
    if not ours or active is None:
        return original(controller, recv_req)
    output = resolve("sglang.srt.managers.io_struct.SetInternalStateReqOutput")
    try:
        active.settings_with(ours)
    except SereError as error:
        logger.warning("/set_internal_state refused: sere: %s", error)
        return output(updated=False)
    # Everything or nothing: ours only after SGLang has taken the rest.
    recv_req.server_args = rest
    result = original(controller, recv_req) if rest else output(updated=True)
    if result.updated:
        active.update(ours)
    return result
