"""Tiny checkpoints with random weights, one per architecture, in the layout of real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, HEADS, LAYERS, EXPERTS, TOP_K, EXPERT_WIDTH, VOCAB = 64, 4, 3, 16, 4, 32, 257

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 256,
    "eos_token_id": 256,
}


class _Weights(dict[str, torch.Tensor]):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, name: str, *shape: int, std: float | None = None) -> None:
        scale = shape[-1] ** -0.5 if std is None else std
        values = torch.randn(*shape, generator=self._generator) * scale
        self[name] = values.to(torch.bfloat16)

    def ones(self, name: str, size: int) -> None:
        self[name] = torch.ones(size, dtype=torch.bfloat16)

    def mlp(self, prefix: str, width: int, names: tuple[str, str, str] | None = None) -> None:
        gate, up, down = names or ("gate_proj", "up_proj", "down_proj")
        self.random(f"{prefix}.{gate}.weight", width, HIDDEN)
        self.random(f"{prefix}.{up}.weight", width, HIDDEN)
        self.random(f"{prefix}.{down}.weight", HIDDEN, width)

    def attention(self, prefix: str, kv_heads: int, *, bias: bool = False) -> None:
        head_dim = HIDDEN // HEADS
        for name, heads in (("q", HEADS), ("k", kv_heads), ("v", kv_heads)):
            self.random(f"{prefix}.{name}_proj.weight", heads * head_dim, HIDDEN)
            if bias:
                self.random(f"{prefix}.{name}_proj.bias", heads * head_dim, std=0.02)
        self.random(f"{prefix}.o_proj.weight", HIDDEN, HEADS * head_dim)

    def experts(self, prefix: str, count: int, names: tuple[str, str, str] | None = None) -> None:
        # A router with spread, so that tokens disagree about their experts.
        self.random(f"{prefix}.gate.weight", count, HIDDEN, std=0.5)
        for e in range(count):
            self.mlp(f"{prefix}.experts.{e}", EXPERT_WIDTH, names)


def _qwen3_moe(w: _Weights) -> dict[str, Any]:
    for i in range(LAYERS):
        w.attention(f"model.layers.{i}.self_attn", 2)
        w.ones(f"model.layers.{i}.self_attn.q_norm.weight", 16)
        w.ones(f"model.layers.{i}.self_attn.k_norm.weight", 16)
        w.experts(f"model.layers.{i}.mlp", EXPERTS)
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": EXPERT_WIDTH,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    }


def _qwen2_moe(w: _Weights) -> dict[str, Any]:
    for i in range(LAYERS):
        w.attention(f"model.layers.{i}.self_attn", 2, bias=True)
        w.experts(f"model.layers.{i}.mlp", EXPERTS)
        w.mlp(f"model.layers.{i}.mlp.shared_expert", 48)
        w.random(f"model.layers.{i}.mlp.shared_expert_gate.weight", 1, HIDDEN)
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": EXPERT_WIDTH,
        "shared_expert_intermediate_size": 48,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
    }


def _mixtral(w: _Weights) -> dict[str, Any]:
    for i in range(LAYERS):
        w.attention(f"model.layers.{i}.self_attn", 2)
        w.experts(f"model.layers.{i}.block_sparse_moe", EXPERTS, ("w1", "w3", "w2"))
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "intermediate_size": EXPERT_WIDTH,
        "sliding_window": None,
    }


def _olmoe(w: _Weights) -> dict[str, Any]:
    for i in range(LAYERS):
        w.attention(f"model.layers.{i}.self_attn", HEADS)
        w.ones(f"model.layers.{i}.self_attn.q_norm.weight", HIDDEN)
        w.ones(f"model.layers.{i}.self_attn.k_norm.weight", HIDDEN)
        w.experts(f"model.layers.{i}.mlp", EXPERTS)
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "intermediate_size": EXPERT_WIDTH,
        "num_key_value_heads": HEADS,
        "norm_topk_prob": False,
        "clip_qkv": None,
    }


def _deepseek_v2(w: _Weights) -> dict[str, Any]:
    nope, rope, v_dim, kv_rank = 16, 8, 16, 32
    for i in range(LAYERS):
        attn = f"model.layers.{i}.self_attn"
        w.random(f"{attn}.q_proj.weight", HEADS * (nope + rope), HIDDEN)
        w.random(f"{attn}.kv_a_proj_with_mqa.weight", kv_rank + rope, HIDDEN)
        w.ones(f"{attn}.kv_a_layernorm.weight", kv_rank)
        w.random(f"{attn}.kv_b_proj.weight", HEADS * (nope + v_dim), kv_rank)
        w.random(f"{attn}.o_proj.weight", HIDDEN, HEADS * v_dim)
        if i == 0:
            w.mlp("model.layers.0.mlp", 96)
        else:
            w.experts(f"model.layers.{i}.mlp", EXPERTS)
            w.mlp(f"model.layers.{i}.mlp.shared_experts", 2 * EXPERT_WIDTH)
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": EXPERT_WIDTH,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "ep_size": 1,
        "q_lora_rank": None,
        "kv_lora_rank": kv_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": v_dim,
        "num_key_value_heads": HEADS,
        "head_dim": rope,
        "attention_bias": False,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    }


def _dense(w: _Weights) -> dict[str, Any]:
    for i in range(LAYERS):
        w.attention(f"model.layers.{i}.self_attn", 2)
        w.ones(f"model.layers.{i}.self_attn.q_norm.weight", 16)
        w.ones(f"model.layers.{i}.self_attn.k_norm.weight", 16)
        w.mlp(f"model.layers.{i}.mlp", 96)
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}


_ARCHITECTURES: dict[str, Callable[[_Weights], dict[str, Any]]] = {
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "deepseek_v2": _deepseek_v2,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "dense": _dense,
}

MOE_ARCHITECTURES = [name for name in _ARCHITECTURES if name != "dense"]


def write_checkpoint(architecture: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a servable model folder (config, weights, byte-level tokenizer); returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = _Weights(seed)
    weights.random("model.embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
    weights.random("lm_head.weight", VOCAB, HIDDEN)
    weights.ones("model.norm.weight", HIDDEN)
    for i in range(LAYERS):
        weights.ones(f"model.layers.{i}.input_layernorm.weight", HIDDEN)
        weights.ones(f"model.layers.{i}.post_attention_layernorm.weight", HIDDEN)
    config = {**_COMMON, **_ARCHITECTURES[architecture](weights)}
    save_file(dict(weights), str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(folder)
    return folder


def moe_layer_ids(architecture: str) -> list[int]:
    return list(range(1 if architecture == "deepseek_v2" else 0, LAYERS))


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
