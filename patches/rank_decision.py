"""Seam: ``SchedulerRequestReceiver._pull_raw_reqs``, ``Scheduler.process_input_requests``:
what one rank found out reaches all ranks at the same step.

Clocks and the moment at which device counters arrive differ between ranks, so only the rank that
receives requests looks at them. What it concludes travels like a control request: SGLang
broadcasts it, and every rank applies it before its next batch. So does a failure; a rank that does
not receive requests leaves a note in torch.distributed's store, where the one that does looks
before each batch (SGLang has no road from other ranks to it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.patches.seam import hook
from sere_sglang.runtime import process
from sere_sglang.runtime.rank import SereRuntime
from sere_sglang.schedule.feedback import Failure, Feedback

_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


_OURS = (Feedback, Failure)


def install() -> None:
    hook(
        f"{_RECEIVER}._pull_raw_reqs", _send, HookType.AFTER, runs="always", otherwise=_send_trouble
    )
    hook(
        f"{_SCHEDULER}.process_input_requests",
        _receive,
        HookType.BEFORE,
        needs=["recv_reqs"],
        runs="always",
        otherwise=_receive_failure,
    )


def note_of(active: SereRuntime) -> Callable[[str], None] | None:
    """How this rank tells the others that it failed; None when there are no others."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = _store()
    return lambda reason: store.set(_key(active), reason)


def _send(result: list[Any] | None, *_args: Any) -> list[Any] | None:
    active = process.current()
    if active is None or result is None or not _receives_requests():
        return result
    found: list[Any] = []
    if active.health.failed is None and active.service.tells is not None:
        reason = active.health.trouble or (_told(active) if active.is_due() else None)
        if reason is not None:
            found.append(Failure(reason))
    feedback = active.measuring.take_feedback()
    if feedback is not None:
        found.append(feedback)
    return [*result, *found]


def _send_trouble(result: list[Any] | None, *_args: Any) -> list[Any] | None:
    active = process.current()
    if (
        active is None
        or active.health.trouble is None
        or active.health.failed is not None
        or result is None
    ):
        return result
    return [*result, Failure(active.health.trouble)]


def _receive(
    scheduler: Any, recv_reqs: list[Any], *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    active = process.current()
    # Under pipeline parallelism SGLang hands the same list on to the next stage: leave it alone.
    others = [request for request in recv_reqs if not isinstance(request, _OURS)]
    if active is not None and len(others) < len(recv_reqs):
        for request in recv_reqs:
            if isinstance(request, Feedback):
                active.set_feedback(request)
            elif isinstance(request, Failure):
                active.stop(request.reason)
    return (scheduler, others, *args), kwargs


def _receive_failure(
    scheduler: Any, recv_reqs: list[Any], *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """SGLang itself does not know our objects."""
    active = process.current()
    for request in recv_reqs:
        if isinstance(request, Failure) and active is not None:
            active.stop(request.reason)
    return (scheduler, [r for r in recv_reqs if not isinstance(r, _OURS)], *args), kwargs


def _receives_requests() -> bool:
    from sglang.srt.runtime_context import get_parallel

    # With DP attention every group's first rank pulls, but control requests fan out from rank 0.
    parallel = get_parallel()
    return parallel.pp_rank == parallel.tp_rank == 0


def _told(active: SereRuntime) -> str | None:
    """What another rank has noted."""
    store, key = _store(), _key(active)
    return store.get(key).decode() if store.check([key]) else None


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _key(active: SereRuntime) -> str:
    return f"sere_failure_{active.health.attempt}"
