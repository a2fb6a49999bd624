"""The CPU MoE runner beside the least that the machine could take, cell by cell.

The floor of a cell is the greater of two times, both measured in the same rounds as the runner and
with the same threads: reading the weights of its active experts once, and as many float32
multiplications and additions as the layer has, of the instruction set in use.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sere_sglang.cpu.large_pages import use_large_pages
from sere_sglang.cpu.moe import fused_moe_packed, native_module
from sere_sglang.cpu.packed import PackedExperts

SIZES = {1: (512, 352), 3: (1024, 512), 7: (2048, 576), 16: (2048, 1376)}
"""About so many MB an expert (bfloat16): hidden size, intermediate size."""
EXPERTS = 32
TOKENS = (1, 4, 16, 24, 64)
ACTIVE_PERCENT = (25, 50, 100)
LEAST_TOP_K = 4

_MEMORY = 1 << 30  # bytes of weights per size, in several layers that take turns
_ROUNDS = 15
_ROUND_SECONDS = 3e-3
_MULTIPLY_STEPS = 300_000


@dataclass(frozen=True)
class Case:
    """One call: `layers` differ in their weights only."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    layers: list[PackedExperts]

    @property
    def active(self) -> torch.Tensor:
        return self.ids.unique()

    @property
    def weight_bytes(self) -> int:
        return len(self.active) * (self.layers[0].w13[0].nbytes + self.layers[0].w2[0].nbytes)

    @property
    def operations(self) -> int:
        return 2 * self.ids.numel() * (self.layers[0].w13[0].numel() + self.layers[0].w2[0].numel())


def floor_rows(
    isas: list[str],
    sizes: list[int],
    tokens: tuple[int, ...] = TOKENS,
    percents: tuple[int, ...] = ACTIVE_PERCENT,
) -> Iterator[dict[str, Any]]:
    """One row per size, T, active experts and instruction set, as they are measured."""
    for size in sizes:
        weights = _layers(*SIZES[size])
        for isa in isas:
            module = native_module(isa)
            layers = [PackedExperts.pack(module, *w, in_place=True) for w in weights]
            for rows in tokens:
                for percent in percents:
                    yield _measured(_case(layers, rows, EXPERTS * percent // 100), isa)
            for layer in layers:
                layer.unpack()


HEADER = (
    f"{'ISA':>10} {'MB':>5} {'T':>3} {'active':>6} {'rows':>5} {'us':>8} {'interval':>17} "
    f"{'floor us':>8} {'share':>6}  bound"
)


def line(row: dict[str, Any]) -> str:
    low, high = row["us_interval"]
    return (
        f"{row['isa']:>10} {row['expert_mb']:>5.1f} {row['T']:>3} {row['active']:>6} "
        f"{row['rows_per_expert']:>5.1f} {row['us']:>8.0f} {f'[{low:.0f}, {high:.0f}]':>17} "
        f"{row['floor_us']:>8.0f} {row['share']:>6.0%}  {row['bound']}"
    )


def _measured(case: Case, isa: str) -> dict[str, Any]:
    """Rounds of the three, one after another, so that a busy spell hits all of them."""
    layer = _turns(case.layers)
    active = case.active
    multiply_add = case.layers[0].module.multiply_add

    def run() -> None:
        fused_moe_packed(case.hidden, next(layer), case.ids, case.weights)

    def read() -> None:
        weights = next(layer)
        weights.module.read_experts(weights.w13, weights.w2, active)

    run()
    repeats = max(1, int(_ROUND_SECONDS / _seconds(read)))
    times, reads, arithmetic = [], [], []
    for _ in range(_ROUNDS):
        reads.append(_seconds(read, repeats))
        times.append(_seconds(run, repeats))
        started = time.perf_counter()
        done = multiply_add(_MULTIPLY_STEPS)
        arithmetic.append((time.perf_counter() - started) * case.operations / done)
    memory_us, arithmetic_us = (1e6 * statistics.median(x) for x in (reads, arithmetic))
    shares = [max(r, a) / t for r, a, t in zip(reads, arithmetic, times, strict=True)]
    return {
        "table": "floor",
        "isa": isa,
        "expert_mb": case.weight_bytes / len(active) / 1e6,
        "H": case.layers[0].hidden_size,
        "I": case.layers[0].inter_size,
        "T": len(case.hidden),
        "K": case.ids.shape[1],
        "active": len(active),
        "rows_per_expert": case.ids.numel() / len(active),
        "us": 1e6 * statistics.median(times),
        "us_interval": [1e6 * t for t in _interval(times)],
        "floor_us": max(memory_us, arithmetic_us),
        "memory_us": memory_us,
        "arithmetic_us": arithmetic_us,
        "share": statistics.median(shares),
        "share_interval": _interval(shares),
        "bound": "memory" if memory_us > arithmetic_us else "arithmetic",
    }


def _case(layers: list[PackedExperts], rows: int, active: int) -> Case:
    """Slots dealt in turn over the active experts: each of them used, none twice in a row."""
    top_k = min(active, max(LEAST_TOP_K, -(-active // rows)))
    slots = torch.arange(rows * top_k, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    return Case(
        hidden=torch.randn(rows, layers[0].hidden_size, generator=generator).bfloat16(),
        ids=slots.remainder(active).view(rows, top_k),
        weights=torch.rand(rows, top_k, generator=generator),
        layers=layers,
    )


def _layers(hidden_size: int, inter_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    count = max(1, _MEMORY // (EXPERTS * 3 * hidden_size * inter_size * 2))
    block = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def weight(*shape: int) -> torch.Tensor:
        values = torch.empty(shape, dtype=torch.bfloat16)
        for part in values.view(-1).split(len(block)):
            part.copy_(block[: len(part)])
        use_large_pages(values)  # as a server does
        return values

    return [
        (
            weight(EXPERTS, 2 * inter_size, hidden_size),
            weight(EXPERTS, hidden_size, inter_size),
        )
        for _ in range(count)
    ]


def _turns(layers: list[PackedExperts]) -> Iterator[PackedExperts]:
    while True:
        yield from layers


def _seconds(function: Callable[[], None], repeats: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - started) / repeats


def _interval(values: list[float]) -> list[float]:
    """The middle half of them."""
    low, _, high = statistics.quantiles(values, n=4)
    return [low, high]
