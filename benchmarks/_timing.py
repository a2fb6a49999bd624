"""Timing of many short calls: CUDA-graph replay on a GPU, the host's clock elsewhere.

A candidate is a list of calls that do the same on different inputs, as the layers of a model do. On
a GPU they are captured into one graph, and a replay is timed with events, in two ways:

cold    the L2 cache is overwritten before; then `restore` puts the mutated inputs back, so that
        they are in the cache (as the output of the kernel ahead is) and everything else is not
warm    nothing is overwritten

Before a replay the GPU is kept busy long enough for the host to have launched it. Candidates take
turns, a round at a time, and the median round counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

BUSY_CYCLES = 300_000  # about 150 us at 2 GHz
FLUSH_BYTES = 256 << 20  # several times any L2


def nothing() -> None:
    pass


@dataclass
class Candidate:
    """`calls` may overwrite their inputs; `restore` puts those back and is not timed."""

    calls: Sequence[Callable[[], object]]
    restore: Callable[[], object] = nothing


@dataclass
class Timing:
    """Microseconds per call: the median round, and by how much rounds spread (quartiles)."""

    cold: float
    warm: float
    spread: float


class Timer(Protocol):
    errors: list[str]

    def measure(
        self, candidates: Mapping[str, Candidate], rounds: int, warm: bool = True
    ) -> dict[str, Timing]: ...


@dataclass
class GraphTimer:
    """On the current CUDA device. What cannot be captured is left out and noted in `errors`."""

    flush: torch.Tensor = field(
        default_factory=lambda: torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    )
    errors: list[str] = field(default_factory=list)

    def measure(
        self, candidates: Mapping[str, Candidate], rounds: int, warm: bool = True
    ) -> dict[str, Timing]:
        graphs = {}
        for name, candidate in candidates.items():
            try:
                graphs[name] = self._capture(candidate)
            except Exception as error:  # the others are still worth timing
                self.errors.append(f"{name} in a CUDA graph: {first_line(error)}")
        samples: dict[tuple[str, bool], list[float]] = {}
        for round_index in range(rounds + 1):
            for name, graph in graphs.items():
                for cold in (True, False) if warm else (True,):
                    us = self._replay(graph, candidates[name], cold)
                    if round_index > 0:  # the first one warms up
                        samples.setdefault((name, cold), []).append(us)
        return {
            name: _summary(samples[name, True], samples.get((name, False), [])) for name in graphs
        }

    def _capture(self, candidate: Candidate) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in candidate.calls[:2]:  # compiles, and allocates what is kept
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # The outer context brings the stream back even where the capture fails.
        with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
            for call in candidate.calls:
                call()
        torch.cuda.synchronize()
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph, candidate: Candidate, cold: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self.flush.fill_(1)
        candidate.restore()
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / len(candidate.calls)


class HostTimer:
    """For trying a benchmark out on a CPU: its figures say nothing about a GPU."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def measure(
        self, candidates: Mapping[str, Candidate], rounds: int, warm: bool = True
    ) -> dict[str, Timing]:
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(rounds):
            for name, candidate in candidates.items():
                candidate.restore()
                started = time.perf_counter()
                for call in candidate.calls:
                    call()
                elapsed = time.perf_counter() - started
                samples[name].append(elapsed * 1e6 / len(candidate.calls))
        return {name: _summary(times, times) for name, times in samples.items()}


def copy_bandwidth(device: str, num_bytes: int = 2 << 30, rounds: int = 10) -> float:
    """GB/s of a large copy, bytes read plus bytes written; the median of `rounds`."""
    source = torch.empty(num_bytes // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = []
    for _ in range(rounds):
        if device == "cpu":
            started = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - started)
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * num_bytes / statistics.median(seconds) / 1e9


def cuda_info() -> dict[str, Any]:
    """What a result file says beside the hardware's name; ``cuda`` is None without a GPU."""
    if not torch.cuda.is_available():
        return {"cuda": None}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "cuda": torch.version.cuda or torch.version.hip,
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20),
    }


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _summary(cold: Sequence[float], warm: Sequence[float]) -> Timing:
    spread = 0.0
    if len(cold) >= 4:
        quartiles = statistics.quantiles(cold, n=4)
        spread = quartiles[2] - quartiles[0]
    return Timing(
        cold=statistics.median(cold),
        warm=statistics.median(warm) if warm else float("nan"),
        spread=spread,
    )
