"""Surrogates in Triton: two launches around a layer, which end at once where nothing is lost.

inward   for every lost slot, weight * V_e^T x, before the layer may overwrite its input
outward  output[t] += sum over lost slots of U_e (what inward made) + weight * b_e
"""

# mypy: disable-error-code="no-untyped-def"
# Parameters of kernels are Triton's pointers and tensors, which have no static types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sere_sglang.ops.triton.reroute import on_device

INWARD_TILE = 512
OUTWARD_TILE = 256
TILE_WEIGHTS = 8192  # columns times rank: what a program's registers hold at once


def tile_of(columns: int, hidden_size: int, rank: int) -> int:
    """Columns that a program looks at together: `columns`, fewer where a rank is large."""
    fits = max(16, TILE_WEIGHTS // triton.next_power_of_2(max(1, rank)))
    return min(columns, fits, triton.next_power_of_2(hidden_size))


@triton.jit
def inward_slots(
    hidden, lost, expert, inward, inner, share, row_stride,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One slot of one row per program."""
    row = tl.program_id(0)
    at = row * K + tl.program_id(1)
    weight = tl.load(lost + at)
    if weight != 0.0:
        rank = tl.arange(0, R_PAD)
        own = inward + tl.load(expert + at).to(tl.int64) * (R * H)
        total = tl.zeros([R_PAD], tl.float32)
        for start in range(0, H, TILE):
            column = start + tl.arange(0, TILE)
            inside = column < H
            x = tl.load(hidden + row.to(tl.int64) * row_stride + column, mask=inside, other=0.0)
            some = (rank < R)[:, None] & inside[None, :]
            v = tl.load(own + rank[:, None] * H + column[None, :], mask=some, other=0.0)
            total += tl.sum(v.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
        tl.store(inner + at * R + rank, total * (weight * share), mask=rank < R)


@triton.jit
def outward_slots(
    output, lost, expert, inner, outward, bias, share, row_stride,
    H: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A stretch of one row per program."""
    row = tl.program_id(0)
    slot = tl.arange(0, K_PAD)
    weights = tl.load(lost + row * K + slot, mask=slot < K, other=0.0)
    if tl.max((weights != 0.0).to(tl.int32), axis=0) > 0:
        rank = tl.arange(0, R_PAD)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = column < H
        at = output + row.to(tl.int64) * row_stride + column
        total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        for k in range(K):
            weight = tl.load(lost + row * K + k)
            if weight != 0.0:
                own = tl.load(expert + row * K + k).to(tl.int64)
                mean = tl.load(bias + own * H + column, mask=inside, other=0.0)
                total += weight * share * mean.to(tl.float32)
                if R > 0:
                    some = (rank < R)[:, None] & inside[None, :]
                    u = outward + own * (R * H) + rank[:, None] * H + column[None, :]
                    u = tl.load(u, mask=some, other=0.0).to(tl.float32)
                    part = tl.load(inner + (row * K + k) * R + rank, mask=rank < R, other=0.0)
                    total += tl.sum(u * part[:, None], axis=0)
        tl.store(at, total.to(output.dtype.element_ty), mask=inside)


def inner_products(
    hidden: torch.Tensor,
    lost: torch.Tensor,
    experts: torch.Tensor,
    inward: torch.Tensor,
    share: float,
) -> torch.Tensor:
    """float32 ``[T, K, r]``: share * lost[t, k] * V_e^T hidden[t], e being experts[t, k].

    Undefined where `lost` is 0. See `surrogates.begin_compensation`.
    """
    (rows, slots), (_, rank, size) = lost.shape, inward.shape
    inner = torch.empty(rows, slots, rank, dtype=torch.float32, device=hidden.device)
    if rows == 0 or rank == 0:
        return inner
    with on_device(hidden):
        inward_slots[(rows, slots)](
            hidden, lost, experts, inward, inner, share, hidden.stride(0),
            H=size, K=slots, R=rank, R_PAD=triton.next_power_of_2(rank),
            TILE=tile_of(INWARD_TILE, size, rank),
        )  # fmt: skip
    return inner


def add_(
    output: torch.Tensor,
    inner: torch.Tensor,
    lost: torch.Tensor,
    experts: torch.Tensor,
    outward: torch.Tensor,
    bias: torch.Tensor,
    share: float,
) -> None:
    """Add what `inner_products` began to the layer's output ``[T, H]``, rounded once."""
    (rows, slots), (_, rank, size) = lost.shape, outward.shape
    if rows == 0:
        return
    tile = tile_of(OUTWARD_TILE, size, rank)
    with on_device(output):
        outward_slots[(rows, triton.cdiv(size, tile))](
            output, lost, experts, inner, outward, bias, share, output.stride(0),
            H=size, K=slots, K_PAD=triton.next_power_of_2(slots), R=rank,
            R_PAD=triton.next_power_of_2(max(1, rank)), TILE=tile,
        )  # fmt: skip
