"""Qwen3-MoE and Qwen2-MoE in plain torch, for training on a CPU: the arithmetic of transformers'
Qwen3Moe and Qwen2Moe, with the experts of a layer stacked and its tokens sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 128  # rows


@dataclass(frozen=True)
class Shape:
    """The checkpoint's `config.json` in short.

    shared_inter: width of the expert that every token uses, beside the routed ones; 0 for none.
    A model with one is a Qwen2-MoE: its router's weights are the softmax itself, not renormalised
    over the top-k, its attention has biases and no norms of queries and keys.
    """

    vocab: int = 2048
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 48
    top_k: int = 6
    inter: int = 64
    shared_inter: int = 0
    context: int = 1024
    rope_theta: float = 10_000.0
    eps: float = 1e-6

    @property
    def qwen2(self) -> bool:
        return self.shared_inter > 0

    def hf_config(self) -> dict[str, object]:
        family = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": self.head_dim,
            "norm_topk_prob": True,
            "attention_bias": False,
        }
        if self.qwen2:
            family = {
                "architectures": ["Qwen2MoeForCausalLM"],
                "model_type": "qwen2_moe",
                "norm_topk_prob": False,
                "shared_expert_intermediate_size": self.shared_inter,
                "qkv_bias": True,
            }
        return {
            **family,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.inter,
            "intermediate_size": self.inter * self.top_k,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.eps,
            "tie_word_embeddings": False,  # SGLang's Qwen3-MoE always loads its own lm_head
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "router_aux_loss_coef": 0.01,
            "output_router_logits": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "torch_dtype": "bfloat16",
        }


# The models of this repository: the demo's, and one of another shape for what is claimed of rules.
SHAPES = {
    "demo": Shape(),
    "shared": Shape(hidden=128, head_dim=32, experts=64, inter=96, shared_inter=192),
}


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, q, bias=shape.qwen2)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=shape.qwen2)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=shape.qwen2)
        self.o_proj = nn.Linear(q, shape.hidden, bias=False)
        if not shape.qwen2:
            self.q_norm = Norm(shape.head_dim, shape.eps)
            self.k_norm = Norm(shape.head_dim, shape.eps)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        b, t, _ = x.shape
        s = self.shape
        q = self.q_proj(x).view(b, t, s.heads, s.head_dim)
        k = self.k_proj(x).view(b, t, s.kv_heads, s.head_dim)
        if not s.qwen2:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        v = self.v_proj(x).view(b, t, s.kv_heads, s.head_dim).transpose(1, 2)
        q, k = _rotate(q, *rope), _rotate(k, *rope)
        groups = s.heads // s.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos[: x.shape[-2]] + turned * sin[: x.shape[-2]]


class _Scatter(torch.autograd.Function):
    """Tokens to their experts' rows; the gradient is a gather, not autograd's accumulating put."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, sources: torch.Tensor, place: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.top_k = top_k
        return x.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        return (
            grad.index_select(0, place).view(-1, ctx.top_k, grad.shape[-1]).sum(1),
            None,
            None,
            None,
        )


class _Gather(torch.autograd.Function):
    """Experts' rows back to slots; every row is read once at most, so nothing accumulates."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.count = len(rows)
        return rows.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, grad.shape[-1]).index_copy_(0, place, grad), None


class SharedExpert(nn.Module):
    """The expert of every token, weighed by a sigmoid of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.shared_inter, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.shared_inter, bias=False)
        self.down_proj = nn.Linear(shape.shared_inter, shape.hidden, bias=False)
        self.share = nn.Linear(shape.hidden, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out * F.sigmoid(self.share(x))


class Experts(nn.Module):
    """Router and experts of one layer. `load` counts slots per expert since it was zeroed."""

    load: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Parameter(torch.empty(shape.experts, shape.hidden))
        self.w13 = nn.Parameter(torch.empty(shape.experts, 2 * shape.inter, shape.hidden))
        self.w2 = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.inter))
        self.shared = SharedExpert(shape) if shape.qwen2 else None
        self.register_buffer("load", torch.zeros(shape.experts), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden] -> output [T, hidden], load-balance loss (Switch, equation 4)."""
        s = self.shape
        with torch.autocast("cpu", enabled=False):
            probs = F.linear(x.float(), self.gate).softmax(-1)
        weights, ids = probs.topk(s.top_k, -1)
        if not s.qwen2:
            weights = weights / weights.sum(-1, keepdim=True)
        flat = ids.reshape(-1)
        counts = torch.bincount(flat, minlength=s.experts)
        # Whole blocks per expert: a GEMM library that compiles per shape meets few shapes.
        room = (counts + BLOCK - 1) // BLOCK * BLOCK
        order = flat.argsort(stable=True)
        shift = (room.cumsum(0) - room) - (counts.cumsum(0) - counts)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order)) + shift[flat[order]]
        sources = torch.zeros(int(room.sum()), dtype=torch.long)
        sources[place] = torch.arange(len(order)) // s.top_k
        w13, w2 = self.w13.to(x.dtype), self.w2.to(x.dtype)
        mine = _Scatter.apply(x, sources, place, s.top_k).split(room.tolist())
        outs = []
        # unbind, not [expert]: the gradient of an index is a whole zeroed tensor each time.
        for rows, up_gate, down in zip(mine, w13.unbind(), w2.unbind(), strict=True):
            gate, up = F.linear(rows, up_gate).chunk(2, -1)
            outs.append(F.linear(F.silu(gate) * up, down))
        chosen = _Gather.apply(torch.cat(outs), place).view(len(x), s.top_k, -1)
        out = torch.einsum("tkh,tk->th", chosen, weights.to(x.dtype))
        if self.shared is not None:
            out = out + self.shared(x)
        share = counts.float() / len(flat)
        self.load += counts
        return out, s.experts * (share * probs.mean(0)).sum()


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)
        self.mlp = Experts(shape)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), rope)
        out, balance = self.mlp(self.post_attention_layernorm(x).flatten(0, 1))
        return x + out.view_as(x), balance


class QwenMoe(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.empty(shape.vocab, shape.hidden))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.eps)
        steps = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        angles = torch.outer(torch.arange(shape.context).float(), shape.rope_theta**-steps)
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos", angles.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angles.sin().bfloat16(), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                # Residual writers start smaller, so that depth does not add up (GPT-2).
                last = name.endswith(("o_proj.weight", "w2", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * shape.layers) ** 0.5 if last else 0.02)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [B, T] -> logits [B, T, vocab] bfloat16, mean load-balance loss."""
        x = F.embedding(tokens, self.embed).bfloat16()
        balance = x.new_zeros((), dtype=torch.float32)
        for layer in self.layers:
            x, loss = layer(x, (self.cos, self.sin))
            balance = balance + loss / len(self.layers)
        return F.linear(self.norm(x), self.embed.to(x.dtype)), balance

    @property
    def blocks(self) -> list[Layer]:
        """`layers`, with their type."""
        return cast(list[Layer], list(self.layers))

    def hf_tensors(self) -> dict[str, torch.Tensor]:
        """Weights under their Hugging Face names, bfloat16."""
        out = {
            "model.embed_tokens.weight": self.embed,
            "lm_head.weight": self.embed.clone(),  # tied in training
            "model.norm.weight": self.norm.weight,
        }
        for i, layer in enumerate(self.blocks):
            at = f"model.layers.{i}"
            for name, p in layer.named_parameters():
                if not name.startswith("mlp."):
                    out[f"{at}.{name}"] = p
            out[f"{at}.mlp.gate.weight"] = layer.mlp.gate
            for e in range(self.shape.experts):
                expert = f"{at}.mlp.experts.{e}"
                gate, up = layer.mlp.w13[e].chunk(2)
                out[f"{expert}.gate_proj.weight"] = gate
                out[f"{expert}.up_proj.weight"] = up
                out[f"{expert}.down_proj.weight"] = layer.mlp.w2[e]
            if layer.mlp.shared is not None:
                for name, p in layer.mlp.shared.named_parameters():
                    name = (
                        f"shared_expert.{name}" if "proj" in name else "shared_expert_gate.weight"
                    )
                    out[f"{at}.mlp.{name}"] = p
        return {name: p.detach().bfloat16().contiguous() for name, p in out.items()}
