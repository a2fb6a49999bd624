"""Seam of ``sere-sglang doctor --model``: ``ModelRunner.load_model``, where a
MoE layer can run and nothing serves yet.

Installed in a scheduler only when the record carries the question; the answer goes back with the
ready handshake.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.errors import SereError
from sere_sglang.patches.seam import hook
from sere_sglang.runtime.moe_layers import (
    moe_layers,
    require_standard_format,
    routed_top_k,
    routers_of,
)
from sere_sglang.schedule.cost import MoeCost

ANSWER = "sere_cost"
"""Key of the handshake: `MoeCost`, or text that says why there is none."""

_RECORD_ATTRIBUTE = "_sere_doctor"

_answer: MoeCost | str = "no model was loaded"


def ask(record: Any) -> None:
    """Let the question ride on a ``ServerArgs`` record into the worker processes."""
    setattr(record, _RECORD_ATTRIBUTE, True)


def is_asked(record: Any) -> bool:
    return bool(getattr(record, _RECORD_ATTRIBUTE, False))


def install(*, device: str) -> None:
    """In a scheduler process, before its model loads."""
    from sere_sglang.patches import cpu_moe

    if device == "cpu":
        cpu_moe.install()
    hook("sglang.srt.model_executor.model_runner.ModelRunner.load_model", _time, HookType.AFTER)


def report(handshake: dict[str, Any]) -> None:
    handshake[ANSWER] = _answer


def _time(_result: Any, runner: Any) -> None:
    from sere_sglang.patches.model_runner import time_layers

    global _answer
    if runner.is_draft_worker:
        return
    name = type(runner.model).__name__
    layers, routers = moe_layers(runner.model), routers_of(runner.model)
    if not layers or set(layers) - set(routers):
        _answer = f"SERE cannot re-route {name}: it has no MoE layers behind SGLang's TopK"
        return
    try:
        for layer in layers:
            require_standard_format(routers[layer], name, asked="--model")
    except SereError as error:
        _answer = str(error)
        return
    _answer = time_layers(runner, {layer: routed_top_k(routers[layer]) for layer in layers})
