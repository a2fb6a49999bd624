"""Models of launch/gpu_server.py: true shapes as a config.json, weights random (SGLang's dummy)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import random_similarity
from sere_sglang.profile import (
    DEFAULT_FILE_NAME,
    MoeModelInfo,
    ProfileMetadata,
    SereProfile,
    save_profile,
)

_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_QWEN3 = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **_COMMON}
_QWEN3 |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}

MODELS: dict[str, dict[str, Any]] = {
    "Qwen1.5-MoE-A2.7B": {
        **_COMMON,
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "vocab_size": 151936,
    },
    "DeepSeek-V2-Lite": {
        **_COMMON,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "ep_size": 1,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        "vocab_size": 102400,
    },
    "Qwen3-30B-A3B": {
        **_QWEN3,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    },
}
TINY: dict[str, Any] = {
    **_QWEN3,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 512,
}
"""Of a dry run."""


def write_model(config: dict[str, Any], folder: Path, layers: int) -> Path:
    """`folder` with config.json of at most `layers` layers, and a random profile that fits."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {**config, "num_hidden_layers": min(layers, config["num_hidden_layers"])}
    (folder / "config.json").write_text(json.dumps(given))
    model = MoeModelInfo.from_folder(folder)
    made = torch.Generator().manual_seed(0)
    matrices = {i: random_similarity(model.num_experts, made) for i in model.layer_ids}
    about = ProfileMetadata(
        model=str(folder), architecture=model.architecture, fingerprint=model.fingerprint
    )
    save_profile(SereProfile(about, matrices), folder / DEFAULT_FILE_NAME)
    return folder


def layers_that_fit(config: dict[str, Any], memory: float) -> int:
    """How many layers take at most half of `memory` bytes in bfloat16."""
    experts = config.get("num_experts") or config["n_routed_experts"]
    layer = 2 * 3 * config["hidden_size"] * config["moe_intermediate_size"] * experts
    return max(2, int(memory / 2 / layer))
