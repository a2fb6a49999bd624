"""What this CPU can do at most: bytes read and float32 operations per second, measured natively.

No MoE layer is faster than reading its active experts once, nor than its multiplications at the
float32 peak of the instruction set in use (only AMX multiplies bfloat16 faster than that).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sere_sglang.cpu.isa import isa as isa_in_use
from sere_sglang.cpu.large_pages import use_large_pages
from sere_sglang.cpu.moe import native_module

_BLOCK = (1024, 1024)  # of uint8, in each of two tensors
_WORKING_SET = (2 << 20, 512 << 20, 1 << 30)  # bytes: least, unless told otherwise, most
_MULTIPLY_STEPS = 1_000_000  # a few milliseconds, more than a system leaves a thread waiting


@dataclass(frozen=True)
class Floor:
    """Rates with all threads at work: 1e9 bytes per second, 1e9 operations per second."""

    isa: str
    read_gb_s: float
    float32_gflop_s: float

    def seconds(self, weight_bytes: float, operations: float) -> float:
        """The least time for reading these weights and for these multiplications and additions."""
        memory, arithmetic = self.read_gb_s * 1e9, self.float32_gflop_s * 1e9
        return max(weight_bytes / memory, operations / arithmetic)


def measure_floor(
    seconds: float = 0.3, isa: str | None = None, working_set: int = _WORKING_SET[1]
) -> Floor:
    """Measure in about `seconds`, half for each rate, after the kernels are compiled.

    Args:
        isa: instruction set to multiply with, else the one in use.
        working_set: bytes that are read in turn, of all layers: what fits into a cache, which on
            servers may hold hundreds of megabytes, is read faster than what does not. At most 1 GiB
            are looked at.

    Raises:
        BuildError: no compiler here. SereError: ``SERE_CPU_ISA`` names what does not run here.
    """
    name = isa or isa_in_use()
    module = native_module(name)
    least, _, most = _WORKING_SET
    num_blocks = min(max(working_set, least), most) // least
    first, second = (torch.ones(num_blocks, *_BLOCK, dtype=torch.uint8) for _ in range(2))
    use_large_pages(first, second)  # as the weights that are read
    blocks = torch.arange(num_blocks, dtype=torch.int32)

    def read() -> int:
        module.read_experts(first, second, blocks)
        return first.numel() + second.numel()

    def multiply() -> int:
        return module.multiply_add(_MULTIPLY_STEPS)

    return Floor(name, _rate(read, seconds / 2) / 1e9, _rate(multiply, seconds / 2) / 1e9)


def _rate(work: Callable[[], float], seconds: float) -> float:
    """The best repetition of what `work` says it did, per second; the first warms up.

    Not the median: a floor is what the machine can do, and whatever else it does only adds time.
    """
    rates: list[float] = []
    began = time.perf_counter()
    while len(rates) < 4 or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        done = work()
        rates.append(done / (time.perf_counter() - started))
    return max(rates[1:])
