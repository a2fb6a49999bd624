"""The native CUDA libraries: what the wheel has, or what nvcc makes of ``csrc/*.cu`` here."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from sere_sglang.ops.cuda import prebuilt
from sere_sglang.ops.cuda.plan import Form, Plan
from sere_sglang.ops.jit import BuildError, compile_ahead, find_nvcc, load_module

LIBRARIES = {
    "reroute": "reroute.cu",
    "fused": "reroute_fused.cu",
    "rules": "rules.cu",
    "rules_fused": "rules_fused.cu",
}
"""Library, and exported function -> source."""

OLDEST_GPU = (8, 0)
CLUSTERS_SINCE = (9, 0)  # as programmatic dependent launch


def is_available(device_type: str) -> str | None:
    """CUDA tensors, on a GPU from sm_80 and a machine with nvcc, or what the wheel has for it."""
    if device_type != "cuda":
        return f"serves CUDA tensors, not {device_type}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no NVIDIA GPU"
    if torch.cuda.get_device_capability() < OLDEST_GPU:
        return f"needs sm_80 or newer, not {torch.cuda.get_device_name()}"
    if importlib.util.find_spec("tvm_ffi") is None:
        return "apache-tvm-ffi is not installed"
    try:
        if any(prebuilt.find(name) is None for name in LIBRARIES):
            find_nvcc()
    except BuildError as error:
        return str(error)
    return None


def compile_for(arch: str) -> None:
    """Compile every library for a GPU that need not be here (``sm_90a``); raises `BuildError`."""
    for name, source in LIBRARIES.items():
        compile_ahead(name, [source], arch)


def compile_into(folder: Path) -> None:
    """Compile every library for what a wheel holds (`prebuilt.ARCHS`); raises `BuildError`."""
    for arch in prebuilt.ARCHS:
        for name, source in LIBRARIES.items():
            compile_ahead(name, [source], arch, prebuilt.library_in(folder, name, arch))


@functools.cache
def load_function(name: str) -> Callable[..., None]:
    """The native function of that name: the wheel's, else compiled for this machine's GPU at first
    use."""
    module = prebuilt.load(name) or load_module(name, [LIBRARIES[name]], cuda=True)
    function: Callable[..., None] = getattr(module, name)
    return function


def grid_scratch(plan: Plan, device: torch.device, num_bytes: int) -> torch.Tensor | None:
    """What the grid form pools its votes in; None for other forms.

    Fresh memory of the current stream (or of the graph being captured), zeroed by the launch
    itself, so calls on several streams do not meet in it.
    """
    if plan.form is not Form.GRID:
        return None
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


@functools.cache
def has_clusters(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= CLUSTERS_SINCE
