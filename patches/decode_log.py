"""Seam: the logger of ``SchedulerMetricsReporter``: SERE in the decode line.

SGLang builds the "Decode batch" line in one function without a hook; a filter on its logger adds
what SERE did since the previous line.
"""

from __future__ import annotations

import logging

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.patches.guard import Guarded
from sere_sglang.runtime import process
from sere_sglang.runtime.shown import log_line

_LOGGER = "sglang.srt.managers.scheduler_components.metrics_reporter"


def install() -> None:
    guarded = Guarded(
        "decode log line", _add, HookType.BEFORE, runs="always", otherwise=lambda _: True
    )
    logging.getLogger(_LOGGER).addFilter(guarded)


def _add(record: logging.LogRecord) -> bool:
    active = process.current()
    if active is not None and isinstance(record.msg, str) and record.msg.startswith("Decode batch"):
        record.msg = f"{record.msg.rstrip(', ')}, {log_line(active)}"
    return True
