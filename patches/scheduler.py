"""Seam: ``Scheduler`` (0.5.13 - 0.5.23): the first code of a worker that knows the flags."""

from __future__ import annotations

import logging
import sys
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang import config
from sere_sglang.patches import calibration, cpu_engine, weight_files
from sere_sglang.patches.seam import declare

logger = logging.getLogger(__name__)

_MODULE = "sglang.srt.managers.scheduler"


def register() -> None:
    """Hook the scheduler, in the processes that have one."""
    # Elsewhere (detokenizer, a launcher before its engine) importing it would cost seconds.
    if _MODULE in sys.modules:
        if cpu_engine.is_active():
            from sere_sglang.patches import cpu_models

            cpu_models.install()
        target = f"{_MODULE}.Scheduler.__init__"
        declare(target, _before_init, HookType.BEFORE, needs=["server_args"])
        declare(f"{_MODULE}.Scheduler.get_init_info", _report, HookType.AFTER)
        weight_files.register()


def _before_init(_scheduler: Any, server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    spec = calibration.spec_of(server_args)
    if spec is not None:
        calibration.install(spec, device=server_args.device)
        return
    asked = config.config_of(server_args)
    if not asked.enabled:
        return
    from sglang.srt.layers.moe.utils import register_moe_runner_backend_name

    from sere_sglang import runtime
    from sere_sglang.patches import cpu_moe, internal_state, model_runner, topk

    register_moe_runner_backend_name("sere")
    runtime.start(asked)
    model_runner.install()
    topk.install()
    internal_state.install()
    if server_args.device == "cpu":
        cpu_moe.install()


def _report(result: dict[str, Any], scheduler: Any) -> None:
    if config.config_of(scheduler.server_args).enabled:
        from sere_sglang import runtime

        active = runtime.current()
        assert active is not None
        result["sere"] = active.describe()
