"""Seam: ``sglang.Engine``.

``Engine.server_args_class`` is SGLang's own override point for building the record from
keywords. The ready handshake of the schedulers is checked here, so that no server can come up
without SERE after being asked for it.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang import config
from sere_sglang.config_check import checked
from sere_sglang.errors import SereError, exit_on_error
from sere_sglang.names import FALLBACK
from sere_sglang.patches import guard, http_server, request_quality, shadow, token_ids
from sere_sglang.patches.seam import hook, resolve

_TARGET = "sglang.srt.entrypoints.engine.Engine"
_UNCONFIRMED = (
    "--moe-backend sere: the scheduler process started without it (is the sere-sglang plugin "
    "excluded by SGLANG_PLUGINS, or installed in another environment?)"
)
_confirming = False


def accept_keywords() -> None:
    """Let ``Engine(moe_backend="sere", sere_primary_k=2, ...)`` through."""
    engine = resolve(_TARGET)
    record_class = engine.server_args_class

    def build(**keywords: Any) -> Any:
        asked = config.pop_keywords(keywords)
        if keywords.get("moe_runner_backend") == "sere":
            asked = dataclasses.replace(asked, moe_backend="sere")
            keywords["moe_runner_backend"] = "auto"
        record = record_class(**keywords)
        config.attach(record, checked(asked))
        if asked.enabled:
            # SGLang resolves the record inside the function to hook: too late for it.
            require_confirmation()
        return record

    engine.server_args_class = staticmethod(build)


def require_confirmation() -> None:
    """From now on a launch fails unless every scheduler confirms that it runs SERE."""
    global _confirming
    if not _confirming:
        _confirming = True
        hook(
            f"{_TARGET}._launch_subprocesses",
            _check_handshake,
            HookType.AFTER,
            needs=["server_args"],
        )


def reported(record: Any) -> AbstractContextManager[None]:
    """A `SereError` ends a command line; ``sglang.Engine(...)`` raises it."""
    from_cli = getattr(record, "_sere_from_cli", False)
    return exit_on_error() if from_cli else nullcontext()


def _check_handshake(result: Any, _cls: type, server_args: Any, *_args: Any, **_kw: Any) -> None:
    asked = config.config_of(server_args)
    if not asked.enabled:
        return
    infos = result[3].scheduler_infos
    if asked.falls_back and not any("sere" in info for info in infos):
        config.serve_without(server_args, infos[0].get(FALLBACK, _UNCONFIRMED))
        return
    if not all("sere" in info for info in infos):
        # SGLang kills the schedulers on its way out; its watchdog would take that for a crash, and
        # end this process by a signal instead of the status that says why.
        if result[4] is not None:
            result[4].stop()
        with reported(server_args):
            raise SereError(_UNCONFIRMED)
    guard.launcher_serves(lambda: http_server.stop(result[0]))
    http_server.install()
    request_quality.install(config.quality_rules(asked))
    token_ids.install()
    shadow.start(result[0], asked.sere_shadow or 0.0, config.quality_rules(asked))
