"""``impl="cuda"``: re-routing in CUDA C++ (``csrc/reroute.cu``), one launch for decode sizes."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sere_sglang.ops import prebuilt
from sere_sglang.ops.control import CONTROL_WORDS
from sere_sglang.ops.cuda_plan import Form, Plan, plan_reroute
from sere_sglang.ops.jit import BuildError, compile_ahead, find_nvcc, load_module
from sere_sglang.ops.table import LayerTable

LIBRARIES = {
    "reroute": "reroute.cu",
    "fused": "reroute_fused.cu",
    "rules": "rules.cu",
    "rules_fused": "rules_fused.cu",
}
"""Library, and exported function -> source."""

SCRATCH_BYTES = 1024  # at least sizeof(GridScratch)
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


@functools.cache
def build() -> None:
    """Compile, and launch once: a driver too old for the compiler shows only then."""
    device = torch.device("cuda", torch.cuda.current_device())
    load_function("reroute")
    ids = torch.zeros(1, 2, dtype=torch.int32, device=device)
    switched_off = torch.zeros(CONTROL_WORDS, dtype=torch.int32, device=device)
    try:
        reroute_(
            ids, None, LayerTable(torch.eye(2, device=device)), switched_off, None, None, False
        )
    except RuntimeError as error:
        raise BuildError(f"reroute was built but does not launch: {error}") from error


def reroute_(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    table: LayerTable,
    control: torch.Tensor,
    row_class: torch.Tensor | None,
    counters: torch.Tensor | None,
    distinct: bool,
) -> None:
    """See `sere_sglang.ops.reroute_`; arguments are validated there."""
    is_recent = has_clusters(topk_ids.device)
    plan = plan_reroute(topk_ids.shape[0], topk_ids.shape[1], is_recent)
    load_function("reroute")(
        *operands(topk_weights, topk_ids, table, control, row_class, counters, distinct),
        *launch_operands(plan, topk_ids.device, is_recent),
    )


def operands(
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    table: LayerTable,
    control: torch.Tensor,
    row_class: torch.Tensor | None,
    counters: torch.Tensor | None,
    distinct: bool,
) -> tuple[Any, ...]:
    """The tensors of a native function, in its order, and what rows they ask for."""
    tables = (table.similarity, table.neighbors, table.scale)
    return topk_ids, topk_weights, *tables, control, row_class, counters, distinct


def launch_operands(plan: Plan, device: torch.device, overlaps: bool) -> tuple[Any, ...]:
    """The last arguments of a native function: the grid form's scratch, and the launch."""
    scratch = grid_scratch(plan, device, SCRATCH_BYTES)
    return scratch, int(plan.search), int(plan.form), plan.blocks, plan.threads, overlaps


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
