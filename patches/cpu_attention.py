"""Seam: decode attention of SGLang's torch-native backend, one operator for the whole batch.

``TorchNativeAttnBackend._run_sdpa_forward_decode`` loops over requests (and says itself that this
is inefficient): a third of a step of 48 requests of the padded demo model, where with an attention
kernel it is next to nothing. Installed where SERE is on, like our CPU MoE runner: without the flag
SGLang is what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType
from torch.nn.functional import scaled_dot_product_attention

from sere_sglang.patches.seam import hook

_BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
_MOST_PADDING = 3.0
"""Times as many keys as the requests have, up to which they are padded to one length."""


def install() -> None:
    target = f"{_BACKEND}._run_sdpa_forward_decode"
    needs = ["query", "output", "k_cache", "v_cache", "req_to_token", "req_pool_indices"]
    needs += ["seq_lens", "encoder_lens", "scaling", "sliding_window_size"]
    hook(target, _decode, HookType.AROUND, needs=needs, runs="until it fails")


def _decode(
    original: Callable[..., torch.Tensor],
    backend: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window_size: int | None = None,
    **others: Any,
) -> torch.Tensor:
    """query ``[B, heads, D]``, caches ``[tokens, kv_heads, D]``, output ``[B, heads, Dv]``."""
    longest = int(seq_lens.max()) if len(seq_lens) else 0
    padding = longest * len(seq_lens) > _MOST_PADDING * int(seq_lens.sum())
    windowed = is_windowed(sliding_window_size)
    if encoder_lens is not None or windowed or padding or len(seq_lens) < 2:
        return original(
            backend,
            query,
            output,
            k_cache,
            v_cache,
            req_to_token,
            req_pool_indices,
            seq_lens,
            encoder_lens,
            scaling=scaling,
            sliding_window_size=sliding_window_size,
            **others,
        )
    held = torch.arange(longest) < seq_lens.unsqueeze(1)  # [B, longest]
    tokens = torch.where(held, req_to_token[req_pool_indices, :longest], 0).flatten()
    keys, values = (
        cache.flatten(1)
        .index_select(0, tokens)
        .view(len(held), longest, *cache.shape[1:])
        .transpose(1, 2)
        .to(query.dtype)
        for cache in (k_cache, v_cache)
    )  # [B, kv_heads, longest, D]
    # Heads that share keys stand where queries do: torch's fused kernel for CPUs has no GQA.
    rows, kv_heads = len(held), keys.shape[1]
    grouped = query.reshape(rows, kv_heads, -1, query.shape[-1])
    mixed = scaled_dot_product_attention(
        grouped, keys, values, attn_mask=held[:, None, None, :], scale=scaling
    )
    output.copy_(mixed.reshape(output.shape))
    return output


def is_windowed(sliding_window_size: int | None) -> bool:
    """Whether a layer attends to the last tokens only: SGLang has None and -1 for all of them."""
    return sliding_window_size is not None and sliding_window_size > -1
