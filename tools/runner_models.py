"""Models of tools/runner_page.py: as much of their config.json as SGLang's resolution reads."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_experts_per_tok": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
_MLA = {
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_key_value_heads": 16,
}


def _model(architecture: str, model_type: str, **own: Any) -> dict[str, Any]:
    return {**_COMMON, "architectures": [architecture], "model_type": model_type, **own}


QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "fp8": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    },
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "version": "gemm",
        "zero_point": True,
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
    },
    "fp8 (compressed-tensors)": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token"},
            }
        },
    },
    "int4 (compressed-tensors)": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
            }
        },
    },
}

_USUAL = ("bf16", "fp8", "nvfp4", "awq", "gptq")
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "Qwen3-MoE": (_model("Qwen3MoeForCausalLM", "qwen3_moe", num_experts=64), _USUAL),
    "Qwen2-MoE": (
        _model(
            "Qwen2MoeForCausalLM",
            "qwen2_moe",
            num_experts=64,
            shared_expert_intermediate_size=512,
        ),
        _USUAL,
    ),
    "Mixtral": (
        _model("MixtralForCausalLM", "mixtral", num_local_experts=8, num_experts_per_tok=2),
        _USUAL,
    ),
    "DeepSeek-V2": (_model("DeepseekV2ForCausalLM", "deepseek_v2", **_MLA), _USUAL),
    "DeepSeek-V3": (
        _model(
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            **_MLA,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            n_group=8,
            topk_group=4,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
        (*_USUAL, "int4 (compressed-tensors)"),
    ),
    "GLM-4.5": (
        _model(
            "Glm4MoeForCausalLM",
            "glm4_moe",
            n_routed_experts=64,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
        ),
        (*_USUAL, "fp8 (compressed-tensors)"),
    ),
    "gpt-oss": (
        _model("GptOssForCausalLM", "gpt_oss", num_local_experts=32, sliding_window=128),
        ("bf16", "mxfp4"),
    ),
}
"""Name -> config.json without its quantization, and the weights that it is looked at in."""
