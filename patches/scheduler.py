"""Seam: ``Scheduler``: the first code of a worker that knows the flags."""

from __future__ import annotations

import sys
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang import config
from sere_sglang.names import FALLBACK, SIMILARITY
from sere_sglang.patches import calibration, cpu_engine, cpu_pinning, doctor, weight_files
from sere_sglang.patches.seam import declare

_MODULE = "sglang.srt.managers.scheduler"


def register() -> None:
    """Hook the scheduler, in the processes that have one."""
    # Elsewhere (detokenizer, a launcher before its engine) importing it would cost seconds.
    if _MODULE in sys.modules:
        if cpu_engine.is_active():
            from sere_sglang.patches import cpu_models, cpu_verify

            cpu_models.install()
            cpu_verify.install()
        target = f"{_MODULE}.Scheduler.__init__"
        declare(target, _before_init, HookType.BEFORE, needs=["server_args"])
        declare(target, _after_init, HookType.AFTER)
        told = f"{_MODULE}.Scheduler.get_init_info"
        declare(told, _report, HookType.AFTER, runs="always")
        weight_files.register()


def _before_init(_scheduler: Any, server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    if cpu_engine.is_active():
        cpu_pinning.install(server_args)
    make_collector = calibration.collector_of(server_args)
    if make_collector is not None:
        calibration.install(make_collector, device=server_args.device)
        return
    if doctor.is_asked(server_args):
        doctor.install(device=server_args.device)
        return
    asked = config.config_of(server_args)
    if not asked.enabled:
        return
    from sglang.srt.layers.moe.utils import register_moe_runner_backend_name

    from sere_sglang.patches import (
        cpu_attention,
        cpu_moe,
        cuda_graphs,
        decode_log,
        forward_batch,
        internal_state,
        model_runner,
        rank_decision,
        surrogates,
        topk,
    )
    from sere_sglang.runtime import process

    register_moe_runner_backend_name("sere")
    process.ask(asked)
    if server_args.device == "cpu":
        cpu_attention.install()
        cpu_moe.install()
    if server_args.device == "cpu" or asked.rule != SIMILARITY:
        surrogates.install()
    model_runner.install()
    cuda_graphs.install()
    topk.install()
    forward_batch.install()
    rank_decision.install()
    internal_state.install()
    decode_log.install()


def _after_init(_result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    from sglang.srt.runtime_context import get_parallel

    from sere_sglang.patches import rank_decision
    from sere_sglang.runtime import process
    from sere_sglang.runtime.service import Service
    from sere_sglang.schedule.trace import start_trace

    active, parallel = process.current(), get_parallel()
    if active is None:
        return
    metrics = None
    reporter = scheduler.metrics_reporter
    if reporter.current_scheduler_metrics_enabled and reporter.metrics_collector is not None:
        from sere_sglang.runtime.metrics import SereMetrics

        metrics = SereMetrics(reporter.metrics_collector.labels, active.binding.layer_ids)

    def queue() -> tuple[int, int]:
        running = scheduler.running_batch
        return (len(running.reqs) if running is not None else 0), len(scheduler.waiting_queue)

    trace = active.config.sere_trace
    active.serve(
        Service(
            queue=queue,
            measures=parallel.tp_rank == parallel.pp_rank == 0,
            metrics=metrics,
            trace=None if trace is None else start_trace(trace + _trace_suffix(parallel)),
            warms_up=not scheduler.server_args.skip_server_warmup,
            tells=rank_decision.note_of(active),
        )
    )


def _trace_suffix(parallel: Any) -> str:
    """Every process writes a file of its own; the first rank of the first replica the one named."""
    rank = parallel.pp_rank * parallel.tp_size + parallel.tp_rank
    replica = 0 if parallel.attn_dp_enabled else parallel.dp_rank or 0
    return (f".replica{replica}" if replica else "") + (f".rank{rank}" if rank else "")


def _report(result: dict[str, Any], scheduler: Any) -> None:
    if doctor.is_asked(scheduler.server_args):
        doctor.report(result)
    elif config.config_of(scheduler.server_args).enabled:
        from sere_sglang.runtime import process, shown

        active, reason = process.current(), process.reason_without()
        if active is not None:  # else the launcher says that this rank does not run SERE
            result["sere"] = shown.constants(active)
        elif reason is not None:
            result[FALLBACK] = reason
