"""Seams of a calibration run: ``FusedMoE.forward``, where a MoE layer has its
input and its experts chosen; ``ModelRunner.load_model`` and ``forward``; and a method on
``Scheduler``, which SGLang's own ``Engine.collective_rpc`` calls by name on every rank. In the
main process ``engine._set_envs_and_config`` and ``TokenizerManager.auto_create_handle_loop``, which
install SGLang's signal handlers.

Installed in a scheduler only when the record carries what makes a `Collector`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.patches.seam import hook, resolve

_LAYER = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.forward"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_SIGNALS = (
    "sglang.srt.entrypoints.engine._set_envs_and_config",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop",
)
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_RECORD_ATTRIBUTE = "_sere_collection"

RPC = "sere_calibration"
"""Name of the method that ``Engine.collective_rpc`` calls."""


class Collector(Protocol):
    """What is told of a rank's forwards; ``sere_sglang.calibration.collector`` has the one there
    is."""

    def attach(self, model: torch.nn.Module, *, is_writer: bool) -> None: ...

    def begin_forward(self, num_tokens: int, *, is_prefill: bool) -> None: ...

    def collect(self, layer: Any, hidden: torch.Tensor, topk_output: Any) -> None: ...

    def call(self, action: str, **arguments: Any) -> None: ...


_collector: Collector | None = None


def attach(record: Any, make: Callable[[], Collector]) -> None:
    """Let `make`, which is pickled, ride on a ``ServerArgs`` record into the worker processes."""
    setattr(record, _RECORD_ATTRIBUTE, make)


def collector_of(record: Any) -> Callable[[], Collector] | None:
    """What `attach` put there; None when nothing is to be collected."""
    return getattr(record, _RECORD_ATTRIBUTE, None)


class WorkerDied(SystemExit):
    """A worker process of SGLang has ended. No Exception, which an asyncio task would keep."""


def start_engine(record: Any) -> Any:
    """``sglang.Engine`` on `record`, in whose calls `WorkerDied` is raised when a worker dies.

    SGLang's own signal handlers kill this process, or wait for an event loop that does not run.
    """
    from sglang.srt.entrypoints.engine import Engine

    if threading.current_thread() is not threading.main_thread():
        return Engine(server_args=record)
    for installs_handlers in _SIGNALS:
        hook(installs_handlers, _watch_workers, HookType.AFTER)
    return Engine(server_args=record)


def _watch_workers(*_args: Any) -> None:
    signal.signal(signal.SIGQUIT, _on_worker_death)


def _on_worker_death(_signal: int, _frame: Any) -> None:
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # sent by each of them
    resolve("sglang.srt.utils.kill_process_tree")(os.getpid(), include_parent=False)
    raise WorkerDied(1)


def install(make: Callable[[], Collector], *, device: str) -> None:
    """In a scheduler process, before its model loads."""
    from sere_sglang.patches import cpu_moe

    global _collector
    collector = _collector = make()
    hook(_LAYER, _collect, HookType.AROUND, needs=["hidden_states", "topk_output"])
    hook(f"{_RUNNER}.load_model", _attach, HookType.AFTER)
    hook(f"{_RUNNER}.forward", _before_forward, HookType.BEFORE, needs=["forward_batch"])

    def call(_scheduler: Any, **arguments: Any) -> None:
        collector.call(**arguments)

    setattr(resolve(_SCHEDULER), RPC, call)
    if device == "cpu":
        cpu_moe.install()


def _attach(_result: Any, runner: Any) -> None:
    assert _collector is not None
    if not runner.is_draft_worker:
        _collector.attach(runner.model, is_writer=_tp_rank() == 0)


def _tp_rank() -> int:
    return resolve("sglang.srt.distributed.parallel_state.get_tensor_model_parallel_rank")()


def _before_forward(runner: Any, forward_batch: Any, *_args: Any, **_kwargs: Any) -> None:
    assert _collector is not None
    if not runner.is_draft_worker:
        prefill = forward_batch.forward_mode.is_extend()
        _collector.begin_forward(int(forward_batch.input_ids.shape[0]), is_prefill=prefill)


def _collect(
    original: Callable[..., torch.Tensor],
    layer: Any,
    hidden_states: torch.Tensor,
    topk_output: Any,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    assert _collector is not None
    # Before the layer itself: its runner may overwrite its input.
    _collector.collect(layer, hidden_states, topk_output)
    return original(layer, hidden_states, topk_output, *args, **kwargs)
