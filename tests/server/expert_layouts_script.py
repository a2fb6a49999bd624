"""Run by test_expert_layouts.py: where SGLang's kernels put re-routed slots, as JSON.

SGLang's own Triton kernels, in Triton's interpreter, on rows as our stage hands them on and on
rows as the paper makes them, which may name an expert twice. What DeepEP's CUDA counts before it
sends rows is counted here by its definition. An "expert" multiplies its rows by its number, so that
a row which came to the wrong one is seen.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from sglang.kernels.ops.moe import ep_moe_kernels as kernels
from sglang.srt.environ import envs

from benchmarks._common import random_similarity
from sere_sglang.ops import LayerTable, encode_control, reroute_

T, E, K, H, RANKS = 64, 32, 8, 128, 4
OF_RANK = E // RANKS


def rows(*, alike: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden bfloat16 ``[T, H]``, ids int32 and weights float32 ``[T, K]`` of a router."""
    made = torch.Generator().manual_seed(7)
    hidden, logits = torch.randn(T, H, generator=made), torch.randn(T, E, generator=made)
    logits += 2 * torch.randn(E, generator=made)
    if alike:
        logits = logits[:1].repeat(T, 1)
    weights, ids = logits.softmax(-1).topk(K)
    return hidden.bfloat16(), ids.int().contiguous(), weights.contiguous()


def reroute(ids: torch.Tensor, weights: torch.Tensor, *, distinct: bool) -> None:
    """In place, at S = 1."""
    table = LayerTable.build(random_similarity(E, torch.Generator().manual_seed(1)))
    control = encode_control(enabled=True, num_valid=-1, classes=[(1, 0.0)])
    reroute_(ids, weights, table, control, distinct=distinct)


def wanted(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """float32 ``[T, H]``."""
    return hidden.float() * (weights * (ids + 1)).sum(-1, keepdim=True)


def far(output: torch.Tensor, hoped: torch.Tensor) -> float:
    return float(((output.float() - hoped).norm(dim=1) / hoped.norm(dim=1)).max())


def masked(*, alike: bool, distinct: bool) -> dict[str, Any]:
    """deep_gemm's masked layout: `m_max` rows for each expert, behind each other."""
    hidden, ids, weights = rows(alike=alike)
    reroute(ids, weights, distinct=distinct)
    m_max = (T // 256 + 1) * 256
    counts, src2dst = kernels.fused_moe_dispatch_index(ids, E, m_max)
    own = src2dst // m_max == ids.view(-1)  # in its expert's region
    out: dict[str, Any] = {
        "most rows of an expert": int(counts.max()),
        "room": m_max,
        "slots in another expert's rows": int((~own).sum()),
        "slots that share a place": T * K - len(src2dst.unique()),
    }
    if not own.all():
        return out
    counts, _, src2dst, slab, _ = kernels.moe_ep_deepgemm_preprocess(
        ids, E, hidden, K, None, output_dtype=torch.bfloat16
    )
    # What post_reorder_deepgemm does, whose loops the interpreter does not follow.
    slots = slab.view(-1, H)[src2dst.long()].view(T, K, H).float()
    output = (slots * (src2dst.view(T, K, 1) // m_max + 1) * weights[..., None]).sum(1)
    return out | {"far": far(output, wanted(hidden, ids, weights))}


def layout(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DeepEP's ``get_dispatch_layout``: rows for each rank and each expert, and whether a row goes
    to a rank."""
    to_expert = torch.zeros(T, E, dtype=torch.bool).scatter_(1, ids.long(), True)
    to_rank = to_expert.view(T, RANKS, OF_RANK).any(-1)
    return to_rank.sum(0), to_expert.sum(0), to_rank


def normal(*, alike: bool) -> dict[str, Any]:
    """DeepEP's normal mode: a row goes once to each rank that holds one of its experts, which puts
    it behind the others of each expert and adds up what comes out."""
    hidden, ids, weights = rows(alike=alike)
    reroute(ids, weights, distinct=True)
    of_rank, of_expert, to_rank = layout(ids)
    output = torch.zeros(T, H)
    received = []
    for rank in range(RANKS):
        going = to_rank[:, rank]
        assert int(going.sum()) == int(of_rank[rank])
        local = ids[going] - rank * OF_RANK
        local = local.masked_fill((local < 0) | (local >= OF_RANK), -1).contiguous()
        sorted_ids, src2dst, ends = kernels.deepep_run_moe_deep_preprocess(local, OF_RANK)
        received.append(ends.diff())
        packed = torch.zeros(len(sorted_ids), H)
        block = {"BLOCK_SIZE": H}
        kernels.deepep_permute_triton_kernel[(len(local),)](
            hidden[going].float(), packed, src2dst, local, None, K, H, **block
        )
        packed *= (sorted_ids + 1 + rank * OF_RANK)[:, None]
        back = torch.empty(len(local), H)
        kernels.deepep_post_reorder_triton_kernel[(len(local),)](
            packed, back, src2dst, local, weights[going], K, H, 1.0, **block
        )
        output[going] += back
    return {
        "experts whose rows were counted wrongly": int((torch.cat(received) != of_expert).sum()),
        "rows sent": int(of_rank.sum()),
        "far": far(output, wanted(hidden, ids, weights)),
    }


def low_latency(*, alike: bool, distinct: bool) -> dict[str, Any]:
    """DeepEP's low-latency mode: each rank re-routes its own rows, and has as many places with each
    expert as it may have rows."""
    _, ids, weights = rows(alike=alike)
    most = 0
    for own_ids, own_weights in zip(ids.chunk(2), weights.chunk(2), strict=True):
        reroute(own_ids, own_weights, distinct=distinct)
        most = max(most, int(torch.bincount(own_ids.flatten().long()).max()))
    room = envs.SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK.get()
    return {"rows": T // 2, "most slots of an expert": most, "room": room}


def main() -> None:
    out: dict[str, Any] = {}
    for name, alike in (("alike", True), ("apart", False)):
        for kind, distinct in (("distinct", True), ("repeated", False)):
            out[f"masked, {name}, {kind}"] = masked(alike=alike, distinct=distinct)
            out[f"low latency, {name}, {kind}"] = low_latency(alike=alike, distinct=distinct)
        out[f"normal, {name}"] = normal(alike=alike)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
