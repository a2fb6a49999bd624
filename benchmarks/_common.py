"""What every benchmark here shares: naming the hardware, interleaved timing, writing results."""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sere_sglang.measure.machine import cpu_info

RESULTS_DIR = Path(__file__).resolve().parent / "results"


def random_similarity(num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """float32 ``[E, E]``: symmetric, in [0, 1), ones on the diagonal."""
    half = torch.rand(num_experts, num_experts, generator=generator)
    return ((half + half.T) / 2).fill_diagonal_(1.0)


def hardware_info() -> dict[str, Any]:
    """What the numbers were measured on: GPU if there is one, CPU model, cores, memory."""
    gpu = _gpu_name()
    return cpu_info() | ({} if gpu is None else {"gpu": gpu})


def hardware_slug() -> str:
    """A folder name for this machine, such as ``intel-xeon-processor-amx-2c``."""
    info = hardware_info()
    if "gpu" in info:
        name = info["gpu"]
    else:
        features = info["cpu_features"]
        best = next((f for f in ("amx", "avx512bf16", "avx512", "avx2") if f in features), "")
        name = f"{info['cpu']} {best} {info['cores']}c"
    name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*ghz", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def write_result(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    out_dir: Path | None = None,
    **extra: Any,
) -> Path:
    """Write ``{"hardware", "torch", "date", ..., "rows": [...]}`` to ``<name>.json``.

    It goes to `out_dir`, else the folder in ``OUT``, else ``benchmarks/results/<hardware>/``.
    """
    path = result_path(name, out_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = {
        "hardware": hardware_info(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        **extra,
        "rows": list(rows),
    }
    path.write_text(json.dumps(payload, indent=1) + "\n")
    return path


def result_path(name: str, out_dir: Path | None = None) -> Path:
    """Where `write_result` writes it."""
    if out_dir is None:
        out_dir = Path(os.environ.get("OUT") or RESULTS_DIR / hardware_slug())
    return out_dir / f"{name}.json"


def interleaved_median(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    budget_s: float = 1.0,
    warmup: int = 2,
) -> dict[str, float]:
    """Median seconds per call of each function, on the host's clock.

    The functions take turns, a round at a time, so that a busy spell of the machine hits all of
    them alike. A round repeats a short function until it has run for about 2 ms. Rounds stop early
    once `budget_s` is spent, but not before five.
    """
    repeats = {}
    for name, function in functions.items():
        for _ in range(warmup):
            function()
        started = time.perf_counter()
        function()
        once = time.perf_counter() - started
        repeats[name] = max(1, int(2e-3 / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - began > budget_s:
            break
        for name, function in functions.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            samples[name].append((time.perf_counter() - started) / repeats[name])
    return {name: statistics.median(times) for name, times in samples.items()}


@functools.cache
def _gpu_name() -> str | None:
    """Asked once: a GPU that has failed since no longer answers."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
