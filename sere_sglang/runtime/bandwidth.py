"""Where layers cannot be timed: how fast this device reads and multiplies, in milliseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_ROUNDS = 3
_READ_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}  # beyond most caches
_LEAST_READ_BYTES = 1 << 20
_MATMUL_SIZE = {"cuda": 2048, "cpu": 512}
_LEAST_MATMUL_SIZE = 64
# SGLang has no float32 kernels for a GPU's experts; a CPU may have no bfloat16 instructions.
_MATMUL_DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
# When there is no memory even for the smallest buffers. Only their ratio decides anything.
_BYTES_PER_MS = {"cuda": 2e9, "cpu": 2e7}
_FLOPS_PER_MS = {"cuda": 4e11, "cpu": 1e8}


def read_bytes_per_ms(device: torch.device) -> float:
    """Bytes read per millisecond by a sum over memory that no cache holds."""

    def measure(size: int) -> float:
        data = torch.ones(size // 4, dtype=torch.float32, device=device)
        return size / _milliseconds(data.sum, device)

    kind = device.type if device.type in _READ_BYTES else "cpu"
    return _in_what_fits(measure, _READ_BYTES[kind], _LEAST_READ_BYTES) or _BYTES_PER_MS[kind]


def flops_per_ms(device: torch.device) -> float:
    """Operations per millisecond of a matrix multiplication: bfloat16 on a GPU, else float32."""

    def measure(n: int) -> float:
        a = torch.ones(n, n, dtype=_MATMUL_DTYPE[kind], device=device)
        return 2 * n**3 / _milliseconds(lambda: a @ a, device)

    kind = device.type if device.type in _MATMUL_SIZE else "cpu"
    return _in_what_fits(measure, _MATMUL_SIZE[kind], _LEAST_MATMUL_SIZE) or _FLOPS_PER_MS[kind]


def _in_what_fits(measure: Callable[[int], float], size: int, least: int) -> float | None:
    """`measure` at `size`, or at half of it as long as memory runs out."""
    while size >= least:
        try:
            return measure(size)
        except RuntimeError:  # torch.OutOfMemoryError; plain from the CPU's allocator
            size //= 2
    return None


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - started))
    return max(statistics.median(times[1:]), 1e-6)
