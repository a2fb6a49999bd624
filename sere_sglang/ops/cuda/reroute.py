"""``impl="cuda"``: re-routing in CUDA C++ (``csrc/reroute.cu``), one launch for decode sizes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sere_sglang.ops.control import CONTROL_WORDS
from sere_sglang.ops.cuda import library
from sere_sglang.ops.cuda.plan import Plan, plan_reroute
from sere_sglang.ops.jit import BuildError
from sere_sglang.ops.table import LayerTable

SCRATCH_BYTES = 1024  # at least sizeof(GridScratch)

is_available = library.is_available


@functools.cache
def build() -> None:
    """Compile, and launch once: a driver too old for the compiler shows only then."""
    device = torch.device("cuda", torch.cuda.current_device())
    library.load_function("reroute")
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
    is_recent = library.has_clusters(topk_ids.device)
    plan = plan_reroute(topk_ids.shape[0], topk_ids.shape[1], is_recent)
    library.load_function("reroute")(
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
    scratch = library.grid_scratch(plan, device, SCRATCH_BYTES)
    return scratch, int(plan.search), int(plan.form), plan.blocks, plan.threads, overlaps
