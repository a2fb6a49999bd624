"""Which implementation serves a device, and the registry behind ``impl=``.

An implementation is a module with three functions:

``is_available(device_type) -> str | None``
    Cheap, builds nothing. None when it can serve tensors of that device type, else the reason why
    not. A reason is no failure: ``auto`` goes on to the next one.
``build() -> None``
    Compile and load; does nothing the second time. Raises `BuildError`.
``reroute_(topk_ids, topk_weights, table, control, row_class, counters, distinct) -> None``
    Called after ``build()``, with arguments that `sere_sglang.ops.reroute_` has checked and T and K
    of at least 1. ``topk_ids`` and ``topk_weights`` have unit stride within a row, but rows may lie
    further apart than K (a view in front of fused shared-expert columns). Must run on the current
    stream and be capturable in a CUDA graph.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch

from sere_sglang.ops import registry
from sere_sglang.ops.jit import BuildError
from sere_sglang.ops.registry import UnavailableError
from sere_sglang.ops.table import LayerTable

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = {
    "torch": "sere_sglang.ops.reference.reroute",
    "cpu": "sere_sglang.ops.cpu.reroute",
    "triton": "sere_sglang.ops.triton.reroute",
    "cuda": "sere_sglang.ops.cuda.reroute",
}
"""Name -> module, imported when first asked for."""

PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}
"""Device type -> the order in which ``auto`` tries; other devices get torch."""


class Implementation(Protocol):
    def is_available(self, device_type: str) -> str | None: ...

    def build(self) -> None: ...

    def reroute_(
        self,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        table: LayerTable,
        control: torch.Tensor,
        row_class: torch.Tensor | None,
        counters: torch.Tensor | None,
        distinct: bool,
    ) -> None: ...


_ready: dict[tuple[str, str], Implementation] = {}  # (name, device type), built
_auto: dict[str, str] = {}  # device type -> what auto chose


def select_impl(device: torch.device | str, strict: bool = False) -> str:
    """Name the implementation that ``impl="auto"`` uses on a device, building it if need be.

    The choice is made once per device type and process, and logged. An implementation that cannot
    serve the device is passed over; one that should but fails to build is passed over with a
    warning that carries the compiler's error.

    Args:
        device: where the ids will be.
        strict: raise that failure instead.

    Raises:
        BuildError: strict, and a preferred implementation failed to build.
    """
    device_type = torch.device(device).type
    if device_type in _auto and not strict:
        return _auto[device_type]
    passed_over = []
    for name in PREFERENCE.get(device_type, ("torch",)):
        try:
            load_impl(name, device_type)
        except UnavailableError as error:
            passed_over.append(str(error))
            continue
        except BuildError as error:
            if strict:
                raise
            logger.warning("re-routing implementation %r does not build: %s", name, error)
            continue
        if _auto.get(device_type) != name:
            _auto[device_type] = name
            reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
            # An NVIDIA GPU without the toolkit: it works, and the operator may want to know.
            lost = device_type == "cuda" and name != "cuda" and torch.version.hip is None
            tell = logger.warning if lost else logger.info
            tell("re-routing on %s uses implementation %r%s", device_type, name, reasons)
            if lost:
                tell("with nvcc on PATH it is CUDA kernels, fused with top-k where that is plain")
        return name
    raise AssertionError("torch serves every device")


def available_impls(device: torch.device | str) -> list[str]:
    """Every implementation that serves this device here; one that fails to build is left out."""
    names = []
    for name in IMPLEMENTATIONS:
        try:
            load_impl(name, torch.device(device).type)
        except (UnavailableError, BuildError):
            continue
        names.append(name)
    return names


def load_impl(name: str, device_type: str) -> Implementation:
    """One implementation, built. Raises as `registry.load` does."""
    ready = _ready.get((name, device_type))
    if ready is None:
        ready = _ready[name, device_type] = registry.load(IMPLEMENTATIONS, name, device_type)
    return ready
