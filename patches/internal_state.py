"""Seam: ``SchedulerInternalStateController``: readback and live control.

``get_internal_state`` is what ``/server_info`` shows per rank group; ``set_internal_state``
receives what SGLang broadcasts to every rank between two steps (see patches/http_server.py).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.errors import SereError
from sere_sglang.patches.number_keys import PREFIX, STOP, unflatten
from sere_sglang.patches.seam import hook, resolve
from sere_sglang.runtime import process, shown
from sere_sglang.schedule.shadow import taken_from

logger = logging.getLogger(__name__)

_MODULE = "sglang.srt.managers.scheduler_components.internal_state"
_OUTPUT = "sglang.srt.managers.io_struct.SetInternalStateReqOutput"
_TARGET = f"{_MODULE}.SchedulerInternalStateController"


def install() -> None:
    hook(
        f"{_TARGET}.get_internal_state",
        _add_state,
        HookType.AFTER,
        runs="always",
        otherwise=_add_essential_state,
    )
    hook(
        f"{_TARGET}.set_internal_state",
        _set_state,
        HookType.AROUND,
        needs=["recv_req"],
        runs="always",
        otherwise=_refuse,
    )


def _add_state(result: Any, *_args: Any) -> None:
    active = process.current()
    if active is not None:
        result.internal_state["sere"] = shown.state(active)


def _add_essential_state(result: Any, *_args: Any) -> None:
    active = process.current()
    if active is not None:
        result.internal_state["sere"] = shown.essential_state(active)


def _set_state(original: Callable[..., Any], controller: Any, recv_req: Any) -> Any:
    active = process.current()
    ours = [key for key in recv_req.server_args if key.startswith(PREFIX)]
    if not ours or active is None:
        return original(controller, recv_req)
    output = resolve(_OUTPUT)
    try:
        changes, rest = unflatten(recv_req.server_args)
        failed, report = changes.pop(STOP, False), taken_from(changes)
        apply = active.prepared(changes)
    except SereError as error:
        logger.warning("/set_internal_state refused: sere: %s", error)
        return output(updated=False)
    if failed:
        active.stop("a hook in the HTTP process, whose log says more")
    if report is not None:
        active.note_shadow(report)
    # Everything or nothing: ours only after SGLang has taken the rest. The request itself stays
    # whole: under pipeline parallelism it goes on to the next stage, which needs ours as well.
    without_ours = copy.copy(recv_req)
    without_ours.server_args = rest
    result = original(controller, without_ours) if rest else output(updated=True)
    if result.updated and changes:
        apply()
    return result


def _refuse(_original: Callable[..., Any], *_args: Any) -> Any:
    return resolve(_OUTPUT)(updated=False)
