"""A plain MoE layer body in Triton: grouped GEMMs for machines without SGLang's.

Three launches and a sum: list each expert's slots; gate and up projections with SiLU between; down
projection with the routing weight. An expert without slots costs only blocks that end at once, so
the time follows the active experts' weights, as it does in SGLang's kernel.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def list_slots(ids, slots, counts, num_slots, capacity, BLOCK: tl.constexpr):
    """One program per expert: slots[expert, :counts[expert]] are its slots, ascending."""
    expert = tl.program_id(0)
    found = 0
    for start in range(0, num_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        mine = tl.load(ids + slot, mask=slot < num_slots, other=-1) == expert
        place = found + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(slots + expert * capacity + place, slot, mask=mine)
        found += tl.sum(mine.to(tl.int32), axis=0)
    tl.store(counts + expert, found)


@triton.jit
def gate_up(
    x, w1, hidden, slots, counts, capacity, width, inter, TOP_K: tl.constexpr,
    M_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden[slot] = silu(x[token] @ gate.T) * (x[token] @ up.T); w1 [E, 2 I, H], gate first."""
    expert = tl.program_id(2)
    count = tl.load(counts + expert)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    gate = w1 + expert.to(tl.int64) * 2 * inter * width + column[None, :] * width + k[:, None]
    up = gate + inter * width
    for start in range(tl.program_id(0) * BLOCK_M, count, M_SPLITS * BLOCK_M):
        index = start + tl.arange(0, BLOCK_M)
        slot = tl.load(slots + expert * capacity + index, mask=index < count, other=0)
        row = x + (slot // TOP_K)[:, None] * width + k[None, :]
        sum_gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        sum_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for done in range(0, width, BLOCK_K):
            inside = k + done < width
            a = tl.load(row + done, mask=(index < count)[:, None] & inside[None, :], other=0.0)
            valid = inside[:, None] & (column < inter)[None, :]
            sum_gate = tl.dot(a, tl.load(gate + done, mask=valid, other=0.0), sum_gate)
            sum_up = tl.dot(a, tl.load(up + done, mask=valid, other=0.0), sum_up)
        value = sum_gate * tl.sigmoid(sum_gate) * sum_up
        tl.store(
            hidden + slot[:, None] * inter + column[None, :],
            value.to(hidden.dtype.element_ty),
            mask=(index < count)[:, None] & (column < inter)[None, :],
        )


@triton.jit
def down(
    hidden, w2, weights, out, slots, counts, capacity, width, inter, M_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[slot] = weights[slot] * hidden[slot] @ w2[expert].T; w2 [E, H, I]."""
    expert = tl.program_id(2)
    count = tl.load(counts + expert)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    matrix = w2 + expert.to(tl.int64) * width * inter + column[None, :] * inter + k[:, None]
    for start in range(tl.program_id(0) * BLOCK_M, count, M_SPLITS * BLOCK_M):
        index = start + tl.arange(0, BLOCK_M)
        slot = tl.load(slots + expert * capacity + index, mask=index < count, other=0)
        row = hidden + slot[:, None] * inter + k[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for done in range(0, inter, BLOCK_K):
            inside = k + done < inter
            a = tl.load(row + done, mask=(index < count)[:, None] & inside[None, :], other=0.0)
            valid = inside[:, None] & (column < width)[None, :]
            total = tl.dot(a, tl.load(matrix + done, mask=valid, other=0.0), total)
        weight = tl.load(weights + slot, mask=index < count, other=0.0)
        tl.store(
            out + slot[:, None] * width + column[None, :],
            (total * weight[:, None]).to(out.dtype.element_ty),
            mask=(index < count)[:, None] & (column < width)[None, :],
        )


def fused_experts(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """y [T, H] of an MoE layer, capturable in a CUDA graph.

    Args:
        x: ``[T, H]``; w1: ``[E, 2 I, H]``, the gate's rows first; w2: ``[E, H, I]``; all contiguous
            and of one dtype.
        weights: float32 ``[T, K]``; ids: int32 ``[T, K]``; a token may name an expert twice.
    """
    num_tokens, hidden_size = x.shape
    experts, _, inter = w2.shape
    top_k = ids.shape[1]
    num_slots = num_tokens * top_k
    slots = torch.empty(experts, num_slots, dtype=torch.int32, device=x.device)
    counts = torch.empty(experts, dtype=torch.int32, device=x.device)
    block = min(1024, triton.next_power_of_2(num_slots))
    list_slots[(experts,)](ids, slots, counts, num_slots, num_slots, BLOCK=block)

    block_m = 16 if num_tokens <= 64 else 32 if num_tokens <= 128 else 64
    # Blocks that share a weight tile are neighbours in the grid, so that it is read once.
    splits = min(8, triton.cdiv(num_tokens, block_m))
    tiles = {
        "M_SPLITS": splits,
        "BLOCK_M": block_m,
        "BLOCK_K": 128 if x.element_size() == 2 else 32,
    }
    options = {"num_warps": 4, "num_stages": 3}
    hidden = x.new_empty(num_slots, inter)
    block_n = 32  # two matrices
    gate_up[(splits, triton.cdiv(inter, block_n), experts)](
        x, w1, hidden, slots, counts, num_slots, hidden_size, inter,
        TOP_K=top_k, BLOCK_N=block_n, **tiles, **options,
    )  # fmt: skip
    out = x.new_empty(num_tokens, top_k, hidden_size)
    block_n = 64
    down[(splits, triton.cdiv(hidden_size, block_n), experts)](
        hidden, w2, weights, out, slots, counts, num_slots, hidden_size, inter,
        BLOCK_N=block_n, **tiles, **options,
    )  # fmt: skip
    return out.sum(dim=1)


def fused_experts_loop(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """The same by a loop over experts, summed in float32: what both kernels are checked against."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ w1[expert].float().T).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        term = (hidden.to(x.dtype).float() @ w2[expert].float().T) * weights[token, slot, None]
        y.index_add_(0, token, term)
    return y
