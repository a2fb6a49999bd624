"""Which instruction set the CPU MoE runner is compiled for, and which of them run here.

One library per instruction set, with explicit flags, so that every variant can be compiled on
every machine of its architecture, and forced by ``SERE_CPU_ISA`` where the machine executes it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from sere_sglang.errors import SereError

VARIABLE = "SERE_CPU_ISA"
PORTABLE = "portable"


@dataclass(frozen=True)
class Isa:
    """Compiler flags, and the words of ``flags`` in ``/proc/cpuinfo`` that a machine must show."""

    cflags: tuple[str, ...]
    needs: frozenset[str]


_AVX2 = Isa(("-mavx2", "-mfma"), frozenset({"avx2", "fma"}))
_AVX512 = Isa(
    (*_AVX2.cflags, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    _AVX2.needs | {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
)
_AVX512BF16 = Isa((*_AVX512.cflags, "-mavx512bf16"), _AVX512.needs | {"avx512_bf16"})
_AMX = Isa(
    (*_AVX512BF16.cflags, "-mamx-tile", "-mamx-bf16"), _AVX512BF16.needs | {"amx_tile", "amx_bf16"}
)

X86 = {"amx": _AMX, "avx512bf16": _AVX512BF16, "avx512": _AVX512, "avx2": _AVX2}
"""Best first."""

ISAS = X86 | {PORTABLE: Isa((), frozenset())}
"""The portable one is 16-byte vectors: NEON on aarch64, SSE2 on x86."""


def isa() -> str:
    """The instruction set in use: the best one that runs here, unless ``SERE_CPU_ISA`` names one.

    Raises:
        SereError: ``SERE_CPU_ISA`` is unknown, or this machine does not execute it.
    """
    asked = os.environ.get(VARIABLE)
    if not asked:
        return executable()[0]
    check_executable(asked, VARIABLE)
    return asked


def check_executable(name: str, source: str) -> None:
    """Raises `SereError`, naming `source`, unless this machine executes `name`."""
    here = executable()
    if name not in here:
        what = "is not executable here" if name in ISAS else "is unknown"
        raise SereError(f"{source}={name} {what}; this machine can execute: {', '.join(here)}")


@functools.cache
def executable() -> tuple[str, ...]:
    """The instruction sets that this machine executes, best first, the portable one last."""
    flags = _cpu_flags() if platform.machine() in ("x86_64", "AMD64") else frozenset[str]()
    found = [name for name, isa in X86.items() if isa.needs <= flags]
    if "amx" in found and not _tiles_are_enabled():
        found.remove("amx")
    return (*found, PORTABLE)


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    words = next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "")
    return frozenset(words.split())


def _tiles_are_enabled() -> bool:
    """Whether the kernel saves tile registers: a processor may have AMX and its system not."""
    arch_prctl, get_xcomp_support, tile_data = 158, 0x1021, 18
    mask = ctypes.c_uint64(0)
    try:
        status = ctypes.CDLL(None).syscall(arch_prctl, get_xcomp_support, ctypes.byref(mask))
    except (OSError, AttributeError):
        return False
    return status == 0 and bool(mask.value >> tile_data & 1)
