"""Seam: ``SchedulerRequestReceiver._pull_raw_reqs``, ``Scheduler.process_input_requests``
(0.5.19 - 0.5.23): what one rank measured reaches all ranks at the same step.

Clocks and the moment at which device counters arrive differ between ranks, so only the rank that
receives requests looks at them. What it concludes travels like a control request: SGLang
broadcasts it, and every rank applies it before its next batch.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang import runtime
from sere_sglang.patches.seam import hook
from sere_sglang.schedule.feedback import Feedback

_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def install() -> None:
    hook(f"{_RECEIVER}._pull_raw_reqs", _send, HookType.AFTER)
    hook(f"{_SCHEDULER}.process_input_requests", _receive, HookType.BEFORE, needs=["recv_reqs"])


def _send(result: list[Any] | None, *_args: Any) -> list[Any] | None:
    from sglang.srt.runtime_context import get_parallel

    active, parallel = runtime.current(), get_parallel()
    # With DP attention every group's first rank pulls, but control requests fan out from rank 0.
    if active is not None and result is not None and parallel.pp_rank == parallel.tp_rank == 0:
        feedback = active.take_feedback()
        if feedback is not None:
            return [*result, feedback]
    return result


def _receive(
    scheduler: Any, recv_reqs: list[Any], *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    active = runtime.current()
    # Under pipeline parallelism SGLang hands the same list on to the next stage: leave it alone.
    others = [request for request in recv_reqs if not isinstance(request, Feedback)]
    if active is not None and len(others) < len(recv_reqs):
        for request in recv_reqs:
            if isinstance(request, Feedback):
                active.set_feedback(request)
    return (scheduler, others, *args), kwargs
