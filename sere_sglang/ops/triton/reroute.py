"""``impl="triton"``: re-routing for GPUs on machines without nvcc.

Under ``TRITON_INTERPRET=1`` it serves CPU tensors too, slowly, which is how it is tested without a
GPU.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton

from sere_sglang.ops.control import encode_control
from sere_sglang.ops.jit import BuildError
from sere_sglang.ops.table import LayerTable
from sere_sglang.ops.triton import kernels, phases

ONE_PROGRAM_SLOTS = 0 if torch.version.hip else 8192
"""Up to so many slots (rows times padded K) one program does it all in one launch.

Its phases meet at barriers, which on AMD do not wait for stores to device memory; there each phase
is a launch.
"""

SMALL_TILE_SLOTS = 512
LARGE_TILE_SLOTS = 2048
TILE_PAIRS = 2048  # pairs of a row's slots that it looks at together: more spill registers
MATCH_TILE = 4096  # similarities that a program looks at together


def is_available(device_type: str) -> str | None:
    """CUDA (or ROCm) tensors; CPU tensors in interpreter mode only."""
    if device_type == "cuda":
        return "TRITON_INTERPRET=1 is set" if phases.INTERPRETED else None
    if device_type == "cpu":
        return None if phases.INTERPRETED else "on the CPU only under TRITON_INTERPRET=1"
    return f"serves CUDA tensors, not {device_type}"


@functools.cache
def build() -> None:
    """Compile one small case, so that a machine where Triton cannot compile says so here."""
    if phases.INTERPRETED:
        return
    device = torch.device("cuda", torch.cuda.current_device())
    ids = torch.zeros(1, 2, dtype=torch.int32, device=device)
    control = encode_control(enabled=True, num_valid=-1, classes=[(1, 0.0)]).to(device)
    try:
        reroute_(ids, None, LayerTable(torch.eye(2, device=device)), control, None, None, False)
        torch.cuda.synchronize(device)
    except Exception as error:
        raise BuildError(f"Triton {triton.__version__} does not compile: {error}") from error


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
    num_rows, top_k = topk_ids.shape
    id_stride = topk_ids.stride(0)
    weight_stride = 0 if topk_weights is None else topk_weights.stride(0)
    scale = None if topk_weights is None else table.scale
    plan = plan_reroute(num_rows, top_k, table.num_experts)
    sizes, rows, warps = plan.sizes, plan.rows, {"num_warps": plan.warps}
    e_pad, expert_tile = sizes["E_PAD"], plan.expert_tile
    scratch_words = phases.SCRATCH_ROWS * e_pad

    with on_device(topk_ids):
        if plan.one_program:
            scratch = torch.empty(scratch_words, dtype=torch.int32, device=topk_ids.device)
            kernels.reroute_decode[(1,)](
                topk_ids, topk_weights, table.similarity, scale, control, row_class, counters,
                scratch, num_rows, id_stride, weight_stride,
                **sizes, **rows, EXPERT_TILE=expert_tile, DISTINCT=distinct, **warps,
            )  # fmt: skip
            return
        scratch = torch.zeros(scratch_words, dtype=torch.int32, device=topk_ids.device)
        tiles = (triton.cdiv(num_rows, rows["TILE"]),)
        kernels.vote_many[tiles](
            topk_ids, topk_weights, control, row_class, scratch, num_rows, id_stride,
            weight_stride, **sizes, **rows, **warps,
        )  # fmt: skip
        kernels.match_many[(triton.cdiv(table.num_experts, expert_tile),)](
            table.similarity, control, scratch, **sizes, EXPERT_TILE=expert_tile
        )
        kernels.mark_many[tiles](
            topk_ids, topk_weights, control, row_class, scratch, num_rows, id_stride,
            weight_stride, **sizes, **rows, **warps,
        )  # fmt: skip
        kernels.apply_many[tiles](
            topk_ids, topk_weights, scale, control, row_class, scratch, num_rows, id_stride,
            weight_stride, **sizes, **rows, DISTINCT=distinct, **warps,
        )  # fmt: skip
        kernels.finish_many[(1,)](
            topk_ids, counters, control, scratch, num_rows, id_stride,
            E_PAD=e_pad, K=top_k, **rows, DISTINCT=distinct, **warps,
        )  # fmt: skip


class Plan(NamedTuple):
    """How one size is launched; the kernels' compile-time sizes.

    rows: TILE is of rows that a program looks at together. expert_tile: of experts that it matches.
    """

    one_program: bool
    sizes: dict[str, int]
    rows: dict[str, int]
    expert_tile: int
    warps: int


def plan_reroute(num_rows: int, top_k: int, num_experts: int) -> Plan:
    """Of T, K and E."""
    e_pad = max(16, triton.next_power_of_2(num_experts))
    k_pad = triton.next_power_of_2(top_k)
    slots = num_rows * k_pad
    large = slots > SMALL_TILE_SLOTS
    tile_slots = min(LARGE_TILE_SLOTS if large else SMALL_TILE_SLOTS, TILE_PAIRS // k_pad)
    return Plan(
        one_program=slots <= ONE_PROGRAM_SLOTS,
        sizes={"E": num_experts, "E_PAD": e_pad, "K": top_k},
        rows={"K_PAD": k_pad, "TILE": max(1, tile_slots // k_pad)},
        expert_tile=max(1, min(e_pad, MATCH_TILE // e_pad)),
        warps=8 if large else 4,
    )


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
