"""Times a model's own MoE layers when a server starts, as they will serve.

Through SGLang's ``FusedMoE``, so with the runner, the quantization and the weights that serve, on
synthetic routings that activate so many experts for so many rows.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sere_sglang.cpu.isa import isa
from sere_sglang.errors import SereError
from sere_sglang.runtime.bandwidth import flops_per_ms, read_bytes_per_ms
from sere_sglang.runtime.layer_shape import by_shape
from sere_sglang.runtime.layer_timer import Chain, timer_for
from sere_sglang.schedule.cost import MoeCost
from sere_sglang.schedule.layer_cost import BandwidthCost, LayerCost, LayerShape, MeasuredCost

logger = logging.getLogger(__name__)

ROWS = {"cpu": (1, 4, 16, 64), "cuda": (1, 4, 16, 64, 256)}
_BUDGET_S = {"cpu": 1.5, "cuda": 0.35}  # of all shapes together; the last call may end after it
_COLUMNS = 6
_ROUNDS = 9
_LAYERS = {"cpu": 16, "cuda": 8}  # that take turns: no cache holds the weights of the next one


class CannotTime(SereError):
    """These layers cannot be run by themselves; says why."""


def moe_cost(
    layers: Mapping[int, Any],
    top_k: Mapping[int, int],
    *,
    device: torch.device,
    warns: bool = True,
    deferred_weights: bool = False,
) -> MoeCost:
    """The cost of a model's MoE layers on this rank; never raises.

    Runs no collective, so ranks need not agree on the number of calls.

    Args:
        layers: layer id -> ``FusedMoE``.
        top_k: layer id -> routed experts per token.
        warns: say so when they cannot be timed, and are computed from bandwidth instead.
        deferred_weights: SGLang loads them after this.
    """
    started = time.perf_counter()
    shapes = by_shape(layers, top_k)
    try:
        if deferred_weights:
            raise CannotTime("their weights are loaded later")
        measured = _measure(layers, shapes, device)
    except Exception as error:  # whatever an unsupported runner raises, or out of memory
        reason = _said(error)
        if warns:
            logger.warning(
                "SERE: the MoE layers cannot be timed (%s); adaptive uses the bandwidth model",
                reason,
            )
        return _from_bandwidth(shapes, device, reason)
    seconds = time.perf_counter() - started
    return MoeCost(measured, source="measured", seconds=seconds, hardware=hardware(device))


def hardware(device: torch.device) -> dict[str, Any]:
    """For people who look at a table: what it was measured on."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    told: dict[str, Any] = {"device": _cpu_name(), "threads": torch.get_num_threads()}
    with contextlib.suppress(SereError):
        told["isa"] = isa()
    return told


def columns(shape: LayerShape, rows: Sequence[int]) -> tuple[int, ...]:
    """Numbers of active experts to time, ascending: those that each number of rows can have at
    most, and between them where the gaps are largest."""
    counts = {int(shape.most_active(n)) for n in rows} | {min(shape.top_k, shape.num_experts)}
    while len(counts) < _COLUMNS:
        chosen = sorted(counts)
        gap, low = max(((b - a, a) for a, b in itertools.pairwise(chosen)), default=(0, 0))
        if gap < 2:
            break
        counts.add(low + gap // 2)
    return tuple(sorted(counts))


def routing(random: np.random.Generator, shape: LayerShape, rows: int, active: int) -> np.ndarray:
    """int32 ``[rows, K]``: `active` distinct experts in all, distinct in every row, alike in load
    and spread over the ranks that share them."""
    ranks = max(round(1.0 / shape.share), 1)
    experts = random.permutation(shape.num_experts).astype(np.int32)
    of_rank = experts // max(shape.num_experts // ranks, 1)
    place = np.empty_like(experts)  # of an expert among those of its rank
    for rank in range(ranks):
        mine = np.flatnonzero(of_rank == rank)
        place[mine] = np.arange(len(mine))
    chosen = experts[np.lexsort((of_rank, place))][:active]
    return np.resize(random.permutation(chosen), (rows, shape.top_k))


def _measure(
    layers: Mapping[int, Any], shapes: Mapping[LayerShape, list[int]], device: torch.device
) -> tuple[tuple[LayerCost, tuple[int, ...]], ...]:
    if device.type not in _BUDGET_S:
        raise CannotTime(f"on {device.type}, where nobody tried")
    for layer in layers.values():
        _require_bare_forward(layer)
    measured = []
    left = _BUDGET_S[device.type]
    for done, (shape, ids) in enumerate(shapes.items()):
        budget = left / (len(shapes) - done)
        most = _LAYERS[device.type]
        chosen = [layers[i] for i in ids[:: max(1, len(ids) // most)]][:most]
        with torch.no_grad(), _no_reduction(chosen):
            cost, took = _measure_shape(chosen, shape, device, budget)
        left -= took
        measured.append((cost, tuple(ids)))
    return tuple(measured)


def _measure_shape(
    layers: Sequence[Any], shape: LayerShape, device: torch.device, budget_s: float
) -> tuple[MeasuredCost, float]:
    """The table of one shape, and how many seconds of the budget it took."""
    all_rows = ROWS[device.type]
    active = columns(shape, all_rows)
    random = np.random.default_rng(0)
    with timer_for(device) as timer:
        # Serving compiles, loads and allocates the same: no part of the budget.
        chains = {rows: Chain(layers, shape, rows, device) for rows in all_rows}
        for chain in chains.values():
            timer.warm_up(chain)

        def sample(rows: int, experts: int) -> float:
            return timer.ms(chains[rows], lambda: routing(random, shape, rows, experts))

        points = [(r, a) for r in all_rows for a in active if a <= shape.most_active(r)]
        started = time.perf_counter()
        samples = collect(sample, points, budget_s)
        took = time.perf_counter() - started
    ms = np.full((len(all_rows), len(active)), np.nan)
    for (rows, experts), times in samples.items():
        # What else the machine does only ever adds; measured steps correct for what stays.
        ms[all_rows.index(rows), active.index(experts)] = min(times)
    return MeasuredCost.fit(shape, all_rows, active, ms), took


def collect(
    sample: Callable[[int, int], float],
    points: Sequence[tuple[int, int]],
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[tuple[int, int], list[float]]:
    """Several samples of each point, in turns so that a disturbance spreads; points that no time
    is left for have none. The first point always has one.

    Args:
        sample: milliseconds of a layer at (rows, active experts).
        points: in ascending order.
    """
    deadline = clock() + budget_s
    times: dict[tuple[int, int], list[float]] = {}
    took: dict[tuple[int, int], float] = {}  # seconds of the last sample, with its preparation
    for _ in range(_ROUNDS):
        for point in points:
            if times and clock() + _expected_s(point, took) > deadline:
                continue
            started = clock()
            times.setdefault(point, []).append(sample(*point))
            took[point] = clock() - started
    return times


def _expected_s(point: tuple[int, int], took: Mapping[tuple[int, int], float]) -> float:
    """Of a point's next sample: at most so much more than another's as it has more rows or
    experts."""
    if point in took:
        return took[point]
    rows, active = point
    return min(s * max(rows / r, 1.0) * max(active / a, 1.0) for (r, a), s in took.items())


def _require_bare_forward(experts: Any) -> None:
    """Raise `CannotTime` when the layer's forward talks to other ranks, which would have to call
    it as often, or needs a batch that SGLang prepared."""
    from sglang.srt.distributed.device_communicators.pynccl_allocator import (
        is_symmetric_memory_enabled,
    )
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher
    from sglang.srt.layers.moe.utils import (
        get_moe_a2a_backend,
        should_use_flashinfer_cutlass_moe_fp4_allgather,
    )

    if not get_moe_a2a_backend().is_none():
        raise CannotTime(f"--moe-a2a-backend {get_moe_a2a_backend().value} exchanges their rows")
    if type(experts.dispatcher) is not StandardDispatcher:
        raise CannotTime(f"{type(experts.dispatcher).__name__} exchanges their rows")
    if should_use_flashinfer_cutlass_moe_fp4_allgather():
        raise CannotTime("they gather the rows of all DP groups")
    if is_symmetric_memory_enabled():
        raise CannotTime("--enable-symm-mem makes all ranks allocate together")
    if getattr(experts, "_dwdp_bound", False):
        raise CannotTime("their weights arrive from other ranks")


@contextlib.contextmanager
def _no_reduction(layers: Sequence[Any]) -> Iterator[None]:
    """Without the sum over ranks that some models leave to the layer: it costs the same whatever
    is active, and is part of what measured steps correct."""
    before = [layer.reduce_results for layer in layers]
    try:
        for layer in layers:
            layer.reduce_results = False
        yield
    finally:
        for layer, reduces in zip(layers, before, strict=True):
            layer.reduce_results = reduces


def _from_bandwidth(
    shapes: Mapping[LayerShape, list[int]], device: torch.device, reason: str
) -> MoeCost:
    read, multiply = read_bytes_per_ms(device), flops_per_ms(device)
    layers: list[tuple[LayerCost, tuple[int, ...]]] = []
    for shape, ids in shapes.items():
        layer = BandwidthCost(
            shape,
            expert_ms=shape.expert_bytes * shape.share / read,
            slot_ms=shape.slot_flops * shape.share / multiply,
        )
        layers.append((layer, tuple(ids)))
    told = {**hardware(device), "read_gb_s": read / 1e6, "gflop_s": multiply / 1e6}
    return MoeCost(tuple(layers), "bandwidth model", hardware=told, reason=reason)


def _said(error: Exception) -> str:
    text = str(error).strip().split("\n")[0][:200]
    if isinstance(error, CannotTime):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "CPU"
