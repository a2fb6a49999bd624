"""Seam: ``SchedulerInternalStateController`` (0.5.19 - 0.5.23): readback and live control.

``get_internal_state`` is what ``/server_info`` shows per rank group; ``_update_handlers`` maps
the keys of ``/set_internal_state``, which SGLang broadcasts to every rank between two steps.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang import runtime
from sere_sglang.errors import SereError
from sere_sglang.patches.seam import hook, resolve

_MODULE = "sglang.srt.managers.scheduler_components.internal_state"
_TARGET = f"{_MODULE}.SchedulerInternalStateController"


def install() -> None:
    hook(f"{_TARGET}.get_internal_state", _add_state, HookType.AFTER)
    hook(f"{_TARGET}._update_handlers", _add_handler, HookType.AFTER)


def _add_state(result: Any, *_args: Any) -> None:
    active = runtime.current()
    if active is not None:
        result.internal_state["sere"] = active.state()


def _add_handler(handlers: dict[str, Any], *_args: Any) -> dict[str, Any]:
    handlers["sere"] = resolve(f"{_MODULE}._UpdateHandler")(_validate, _apply)
    return handlers


def _validate(_key: str, value: Any) -> None:
    active = runtime.current()
    try:
        if active is None:
            raise SereError("this rank runs without SERE")
        active.settings_with(value)
    except SereError as error:
        raise resolve(f"{_MODULE}.UpdateRejected")(f"sere: {error}") from error


def _apply(_key: str, value: Any) -> None:
    active = runtime.current()
    assert active is not None
    active.update(value)
