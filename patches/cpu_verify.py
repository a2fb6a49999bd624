"""Seam: ``TorchNativeAttnBackend.forward_extend`` while a batch of draft tokens is verified.

It takes such a batch for a prefill, whose lengths it lacks, and knows no tree of drafts: here each
draft attends to its request's tokens and to the drafts above it. Installed on the CPU engine with
and without SERE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType
from torch.nn.functional import scaled_dot_product_attention

from sere_sglang.errors import SereError
from sere_sglang.patches.cpu_attention import is_windowed
from sere_sglang.patches.seam import hook

_TARGET = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend"


def install() -> None:
    needs = ["q", "k", "v", "layer", "forward_batch", "save_kv_cache"]
    hook(_TARGET, _forward_extend, HookType.AROUND, needs=needs, runs="always")


def _forward_extend(
    original: Callable[..., torch.Tensor],
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
) -> torch.Tensor:
    """q ``[B * n, heads * D]`` of B requests with n drafts each."""
    if not forward_batch.forward_mode.is_target_verify():
        return original(backend, q, k, v, layer, forward_batch, save_kv_cache)
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    if layer.is_cross_attention or is_windowed(layer.sliding_window_size):
        raise SereError(
            "the CPU engine verifies drafts of models with full attention only; start the server "
            "without --speculative-algorithm"
        )
    pool = backend.token_to_kv_pool
    if save_kv_cache:
        pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
    queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
    output = q.new_empty(len(queries), layer.tp_q_head_num, layer.v_head_dim)
    caches = (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id))
    drafts = len(queries) // len(forward_batch.seq_lens)
    trees = forward_batch.spec_info.custom_mask.view(-1, drafts, drafts)
    for i, length in enumerate(forward_batch.seq_lens.tolist()):
        rows = slice(i * drafts, (i + 1) * drafts)
        tokens = backend.req_to_token_pool.req_to_token[
            forward_batch.req_pool_indices[i], : length + drafts
        ]
        keys, values = (cache[tokens].transpose(0, 1).to(q.dtype) for cache in caches)
        mask = torch.cat((trees.new_ones(drafts, length), trees[i]), dim=1)
        output[rows] = scaled_dot_product_attention(
            queries[rows].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            scale=layer.scaling,
            enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
        )[0].transpose(0, 1)
    return output.flatten(1)
