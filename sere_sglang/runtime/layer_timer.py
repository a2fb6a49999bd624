"""Clocks around MoE layers that run one after the other: eager, or in a CUDA graph."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from sere_sglang.schedule.layer_cost import LayerShape

logger = logging.getLogger(__name__)


Routing = Callable[[], np.ndarray]
"""A new routing each time: int32 ``[rows, K]``."""


class Chain:
    """`layers` of one shape on the same rows, each with routing of its own.

    Its buffers stay where they are, so that a graph that holds it can be replayed with other
    routings.
    """

    def __init__(
        self, layers: Sequence[Any], shape: LayerShape, rows: int, device: torch.device
    ) -> None:
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        self.layers = layers
        self._top_k = shape.top_k
        some = layers[0]
        shared = some.num_fused_shared_experts
        width = getattr(some, "hidden_size_unpadded", some.hidden_size)
        random = torch.Generator().manual_seed(rows)
        self._hidden = torch.randn(rows, width, generator=random).to(device, some.params_dtype)
        # Every row has the shared experts too, in the slots behind the routed ones.
        last = torch.arange(shape.num_experts, shape.num_experts + shared, dtype=torch.int32)
        slots = torch.cat([torch.arange(shape.top_k, dtype=torch.int32), last]).expand(rows, -1)
        self._topk = [
            StandardTopKOutput(
                torch.full(slots.shape, 1.0 / slots.shape[1], device=device),
                slots.to(device).contiguous(),
                torch.zeros(rows, shape.num_experts, device=device),
            )
            for _ in layers
        ]

    def route(self, layer: int, routing: Routing) -> None:
        """Give the layer at this place new routing."""
        ids = self._topk[layer].topk_ids
        ids[:, : self._top_k].copy_(torch.from_numpy(routing()))

    def run(self, layer: int) -> None:
        self.layers[layer](self._hidden, self._topk[layer])

    def run_all(self) -> None:
        for layer in range(len(self.layers)):
            self.run(layer)


class Timer(Protocol):
    def warm_up(self, chain: Chain) -> None:
        """Whatever happens at first calls only: compiling, loading, capturing."""
        ...

    def ms(self, chain: Chain, routing: Routing) -> float:
        """Of one of its layers, in a run where none has its weights in a cache from the last."""
        ...


@contextlib.contextmanager
def timer_for(device: torch.device) -> Iterator[Timer]:
    """How this device serves: a GPU replays graphs. Gives back what memory it took."""
    if device.type != "cuda":
        yield ClockTimer()
        return
    timer = GraphTimer(device)
    try:
        yield timer
    finally:
        timer.close()


class ClockTimer:
    """For devices that are done when a call returns. Layers take turns."""

    def __init__(self) -> None:
        self._turn = 0

    def warm_up(self, chain: Chain) -> None:
        chain.run(0)

    def ms(self, chain: Chain, routing: Routing) -> float:
        self._turn += 1
        layer = self._turn % len(chain.layers)
        chain.route(layer, routing)
        started = time.perf_counter()
        chain.run(layer)
        return 1000 * (time.perf_counter() - started)


class GraphTimer:
    """Replays a chain's CUDA graph between two events; runs it eagerly where that cannot be
    captured, which counts the launches too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._graphs: dict[Chain, torch.cuda.CUDAGraph | None] = {}
        self._captures = True

    def warm_up(self, chain: Chain) -> None:
        self._graph_of(chain)
        torch.cuda.synchronize(self._device)

    def ms(self, chain: Chain, routing: Routing) -> float:
        for layer in range(len(chain.layers)):
            chain.route(layer, routing)
        graph = self._graph_of(chain)
        run = chain.run_all if graph is None else graph.replay
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            start.record()
            run()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / len(chain.layers)

    def close(self) -> None:
        self._graphs.clear()
        self._pool = None
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def _graph_of(self, chain: Chain) -> torch.cuda.CUDAGraph | None:
        if chain not in self._graphs:
            self._graphs[chain] = self._capture(chain)
        return self._graphs[chain]

    def _capture(self, chain: Chain) -> torch.cuda.CUDAGraph | None:
        """None when it cannot be; then nothing is tried again. Raises what running it raises."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # compile, choose kernels, allocate workspaces
                chain.run_all()
        self._stream.synchronize()
        if not self._captures:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of SGLang may use the GPU meanwhile.
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            ):
                chain.run_all()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._captures = False
            logger.debug("SERE: no CUDA graph of a MoE layer (%s), timed eagerly", error)
            return None
        return graph
