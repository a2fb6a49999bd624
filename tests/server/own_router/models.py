"""Qwen3-MoE whose MoE blocks do not pass SGLang's standard top-k."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM


class OwnTopK(torch.nn.Module):
    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(self, _hidden: torch.Tensor, logits: torch.Tensor, **_: Any) -> StandardTopKOutput:
        weights, ids = logits.float().softmax(-1).topk(self.top_k, -1)
        return StandardTopKOutput(weights, ids.int(), logits)


class NoTopKForCausalLM(Qwen3MoeForCausalLM):
    """No SGLang TopK in the model at all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for layer in self.model.layers:
            layer.mlp.topk = OwnTopK(layer.mlp.topk.topk_config.top_k)


class UnusedTopKForCausalLM(Qwen3MoeForCausalLM):
    """SGLang's TopK is there, but layer 1 routes past it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        block = self.model.layers[1].mlp
        block.unused_topk = block.topk
        block.topk = OwnTopK(block.topk.topk_config.top_k)


EntryClass = [NoTopKForCausalLM, UnusedTopKForCausalLM]
