"""Seam: ``DataParallelController.get_init_info``: the ready handshake with ``--dp-size``.

The controller stands between the schedulers and the launcher and passes on what it knows. The
launcher wants each scheduler's word that it runs SERE (patches/engine.py).
"""

from __future__ import annotations

import sys
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang import config
from sere_sglang.names import FALLBACK
from sere_sglang.patches.seam import declare

_MODULE = "sglang.srt.managers.data_parallel_controller"


def register() -> None:
    """In processes that have the controller's module, before its class is used."""
    if _MODULE in sys.modules:
        declare(f"{_MODULE}.DataParallelController.get_init_info", _report, HookType.AFTER)


def _report(result: dict[str, Any], controller: Any) -> None:
    if config.config_of(controller.server_args).enabled:
        for key in ("sere", FALLBACK):
            replicas = [info.get(key) for info in controller._scheduler_init_infos]
            if replicas and all(replicas):
                result[key] = replicas[0]
