"""What a figure was measured on. Touches no GPU: a server may be about to fill it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

_AMD_FAMILIES = {25: "Zen 3", 26: "Zen 5"}
_FEATURES = {"avx2": "avx2", "avx512": "avx512f", "avx512bf16": "avx512_bf16", "amx": "amx_bf16"}


def cpu_info() -> dict[str, Any]:
    """CPU model, cores of this process, the instruction sets that matter, memory."""
    flags = set(_proc_cpuinfo("flags").split())
    return {
        "cpu": _cpu_name(flags),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_features": [name for name, flag in _FEATURES.items() if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


def _cpu_name(flags: set[str]) -> str:
    """The processor's own, with the core's generation where a cloud's "AMD EPYC" hides it."""
    name = re.sub(r"\s+", " ", _proc_cpuinfo("model name")) or "unknown cpu"
    core = _AMD_FAMILIES.get(int(_proc_cpuinfo("cpu family") or 0))
    if core is None or _proc_cpuinfo("vendor_id") != "AuthenticAMD" or re.search(r"\d", name):
        return name
    return f"{name} ({'Zen 4' if core == 'Zen 3' and 'avx512f' in flags else core})"


def gpu_names() -> list[str]:
    """As the driver's own tool says."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def _proc_cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
