"""What every rank of a server counted, where ``/server_info`` shows the first one's counters.

A plugin of SGLang's for ``launch/gpu_server_steps.py``: a request for ``/server_info`` reaches
every rank, and each writes its own counters to a file then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.serving.plugin import plugin_environment
from sere_sglang.measure.server import Server

_FOLDER = "SERE_RANK_COUNTERS"
Counters = dict[str, dict[str, int]]
"""Layer id -> field of `ops.COUNTER_FIELDS` -> count."""


def environment(folder: Path) -> dict[str, str]:
    """Of a server whose ranks write their counters to `folder`."""
    about = plugin_environment(folder / "site", "counters", "launch.gpu_rank_counters:register")
    return about | {_FOLDER: str(folder)}


def counted(server: Server, folder: Path, ranks: int) -> dict[str, Counters]:
    """Rank -> what it has counted, of a server that has nothing to do. Raises `TimeoutError`."""
    for file in folder.glob("rank*.json"):
        file.unlink()
    server.get("/server_info")
    deadline = time.monotonic() + 60
    while len(files := sorted(folder.glob("rank*.json"))) < ranks:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(files)} of {ranks} ranks wrote their counters")
        time.sleep(0.1)
    return {file.stem: json.loads(file.read_text()) for file in files}


def register() -> None:
    """In every process of the server; touches those that load a model."""
    if "sglang.srt.managers.scheduler" not in sys.modules:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    controller = "sglang.srt.managers.scheduler_components.internal_state"
    HookRegistry.register(
        f"{controller}.SchedulerInternalStateController.get_internal_state",
        _write,
        HookType.BEFORE,
    )


def _write(*_args: Any, **_kwargs: Any) -> None:
    from sglang.srt.runtime_context import get_parallel

    from sere_sglang.ops import COUNTER_FIELDS
    from sere_sglang.runtime import process

    runtime = process.current()
    if runtime is None:
        return
    rows = runtime.binding.counters.tolist()
    told = {
        str(layer): dict(zip(COUNTER_FIELDS, row[: len(COUNTER_FIELDS)], strict=True))
        for layer, row in zip(runtime.binding.layer_ids, rows, strict=True)
    }
    file = Path(os.environ[_FOLDER], f"rank{get_parallel().tp_rank}.json")
    writing = file.with_suffix(".writing")
    writing.write_text(json.dumps(told))
    writing.replace(file)
