"""``impl="cpu"``: re-routing in C++ (``csrc/reroute_cpu.cpp``), what the CPU engine uses."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sere_sglang.ops.jit import load_module
from sere_sglang.ops.table import LayerTable


def is_available(device_type: str) -> str | None:
    """CPU tensors only."""
    return None if device_type == "cpu" else f"serves CPU tensors, not {device_type}"


@functools.cache
def _function() -> Any:
    # A fused multiply-add rounds once where the reference rounds twice.
    flags = ["-ffp-contract=off"]
    return load_module("reroute_cpu", ["reroute_cpu.cpp"], extra_cflags=flags).reroute


def build() -> None:
    _function()


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
    tables = (table.similarity, table.neighbors, table.scale)
    _function()(topk_ids, topk_weights, *tables, control, row_class, counters, distinct)
