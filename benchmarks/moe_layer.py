"""The MoE layers of ``benchmarks.layer``: shapes of real models, random weights, skewed routing.

How tokens choose. A token's logit for an expert is the sum of three terms: how popular the expert
is in this layer (Zipf: the r-th most popular one has -ZIPF * log r), what the token's topic prefers
(a batch mixes requests on TOPICS topics; tokens of one topic choose alike), and noise of the
token's own. Such a batch uses fewer experts than independent uniform choices would, and some of
them much more than others, as batches of real requests do; ``active_plain`` says how many.

The logits come out of the gate's own matrix product: its rows are orthonormal, and a token's
hidden state is its logits times those rows plus a part that no row sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks._common import random_similarity
from sere_sglang.ops import LayerTable, encode_control, reroute_

ZIPF = 0.75
TOPICS = 4
TOPIC_SPREAD = 1.0
TOKEN_SPREAD = 1.0


@dataclass(frozen=True)
class MoeShape:
    model: str
    experts: int
    top_k: int
    hidden: int
    inter: int
    renormalize: bool

    def expert_bytes(self, element_size: int) -> int:
        """Weights of one expert: gate, up and down projection."""
        return 3 * self.hidden * self.inter * element_size


MODELS: tuple[MoeShape, ...] = (
    MoeShape("Qwen3-30B-A3B", 128, 8, 2048, 768, renormalize=True),
    MoeShape("Qwen1.5-MoE-A2.7B", 60, 4, 2048, 1408, renormalize=False),
    MoeShape("DeepSeek-V2-Lite", 64, 6, 2048, 1408, renormalize=False),
)
TINY = MoeShape("tiny", 12, 4, 32, 16, renormalize=True)


@dataclass(frozen=True)
class Kernels:
    """What a layer is made of. fused_topk picks and re-routes at once; None: top-k, then reroute_.

    topk(logits, top_k, renormalize) -> weights, ids
    fused_topk(logits, top_k, renormalize, table, control) -> weights, ids
    experts(x, w1, w2, weights, ids) -> y
    """

    topk: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    fused_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None
    experts: Callable[..., torch.Tensor]


@dataclass
class Layer:
    """Weights in `dtype`: gate_t [H, E], w1 [E, 2 I, H], w2 [E, H, I]."""

    gate_t: torch.Tensor
    popularity: torch.Tensor  # [E]
    w1: torch.Tensor
    w2: torch.Tensor
    table: LayerTable


def make_layers(shape: MoeShape, count: int, device: str, dtype: torch.dtype) -> list[Layer]:
    generator = torch.Generator().manual_seed(shape.experts)
    layers = []
    for _ in range(count):
        rows, _ = torch.linalg.qr(torch.randn(shape.hidden, shape.experts, generator=generator))
        rank = torch.randperm(shape.experts, generator=generator) + 1
        similarity = random_similarity(shape.experts, generator)
        w1 = torch.empty(shape.experts, 2 * shape.inter, shape.hidden, dtype=dtype, device=device)
        w2 = torch.empty(shape.experts, shape.hidden, shape.inter, dtype=dtype, device=device)
        layers.append(
            Layer(
                gate_t=rows.to(device, dtype).contiguous(),
                popularity=-ZIPF * rank.log(),
                w1=w1.normal_(std=shape.hidden**-0.5),
                w2=w2.normal_(std=shape.inter**-0.5),
                table=LayerTable.build(similarity, device=device),
            )
        )
    return layers


def make_tokens(shape: MoeShape, layer: Layer, batch: int, seed: int) -> torch.Tensor:
    """Hidden states ``[batch, H]`` whose gate logits are as the module says."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randint(0, TOPICS, (batch,), generator=generator)
    preference = TOPIC_SPREAD * torch.randn(TOPICS, shape.experts, generator=generator)
    noise = TOKEN_SPREAD * torch.randn(batch, shape.experts, generator=generator)
    logits = layer.popularity + preference[topic] + noise
    gate_t = layer.gate_t.float().cpu()
    unseen = torch.randn(batch, shape.hidden, generator=generator)
    unseen -= unseen @ gate_t @ gate_t.T
    return (logits @ gate_t.T + unseen).to(layer.gate_t.device, layer.gate_t.dtype)


class LayerCall:
    """One layer on one batch, plain (control None) or with SERE: a call is one forward."""

    def __init__(
        self,
        shape: MoeShape,
        layer: Layer,
        x: torch.Tensor,
        kernels: Kernels,
        control: torch.Tensor | None,
    ) -> None:
        self.shape, self.layer, self.x = shape, layer, x
        self.kernels, self.control = kernels, control

    def __call__(self) -> torch.Tensor:
        weights, ids = self.route()
        return self.kernels.experts(self.x, self.layer.w1, self.layer.w2, weights, ids)

    def route(self) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.x @ self.layer.gate_t  # bf16, as SGLang's gates give them
        choice: tuple[Any, ...] = (logits, self.shape.top_k, self.shape.renormalize)
        if self.control is None:
            return self.kernels.topk(*choice)
        if self.kernels.fused_topk is not None:
            return self.kernels.fused_topk(*choice, self.layer.table, self.control)
        weights, ids = self.kernels.topk(*choice)
        reroute_(ids, weights, self.layer.table, self.control)
        return weights, ids

    def active_experts(self) -> int:
        return int(self.route()[1].unique().numel())


def sere_control(primary_k: int, device: str) -> torch.Tensor:
    """Re-route every secondary slot: rho = 0, where the saving is largest."""
    return encode_control(enabled=True, num_valid=-1, classes=[(primary_k, 0.0)]).to(device)


def torch_topk(
    logits: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax top-k in torch, several launches: where nothing better is there."""
    weights, ids = logits.softmax(dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, ids.to(torch.int32)
