"""The published re-routing sequence, written from its description: four launches.

Cast the ids to int64, zero a mask of the experts, scatter the top-S ids into it, then one kernel in
which every slot scans all E experts one after another. Where the description leaves room the
cheaper reading is taken: the scatter needs no contiguous copy of the ids first, and the kernel
writes int32 itself. It assumes ranked slots, and knows no padding, classes or counters.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from sere_sglang.ops.jit import load_module

SOURCE = Path(__file__).with_suffix(".cu")


@functools.cache
def native_module(device_type: str, cuda_arch: str | None = None) -> Any:
    """The compiled ``scan`` (and, for cuda, ``empty``); the CPU build serves tests."""
    if device_type == "cuda":
        return load_module("published_sequence", [str(SOURCE)], cuda=True, cuda_arch=cuda_arch)
    return load_module("published_sequence_cpu", [str(SOURCE)], extra_cflags=["-x", "c++"])


def run_native(
    topk_ids: torch.Tensor, similarity: torch.Tensor, primary_k: int, threshold: float
) -> None:
    """In place on int32 ``[T, K]``, contiguous and best first; capturable in a CUDA graph."""
    ids = topk_ids.to(torch.int64)
    mask = torch.zeros(similarity.shape[0], dtype=torch.bool, device=ids.device)
    mask.index_put_((ids[:, :primary_k],), _true(ids.device))
    native_module(ids.device.type).scan(ids, mask, similarity, topk_ids, primary_k, threshold)


def run_torch(
    topk_ids: torch.Tensor, similarity: torch.Tensor, primary_k: int, threshold: float
) -> torch.Tensor:
    """The same in torch operations, for the CPU benchmark; returns new ids."""
    ids = topk_ids.to(torch.int64)
    mask = torch.zeros(similarity.shape[0], dtype=torch.bool, device=ids.device)
    mask.scatter_(0, ids[:, :primary_k].flatten(), True)
    secondary = ids[:, primary_k:]
    candidates = similarity[secondary].masked_fill_(~mask, -1.0)
    best, best_id = candidates.max(dim=-1)
    keep = mask[secondary] | (best < threshold)
    ids[:, primary_k:] = torch.where(keep, secondary, best_id)
    return ids.to(topk_ids.dtype)


@functools.cache
def _true(device: torch.device) -> torch.Tensor:
    return torch.ones((), dtype=torch.bool, device=device)
