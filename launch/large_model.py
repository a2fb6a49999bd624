"""A checkpoint with experts of a real model's size and random weights: for speed only.

The trained demo model is so small that most of a decode step is not its experts. This one is
bound by their bytes, as real models are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from sere_sglang.profile import MoeModelInfo, ProfileMetadata, SereProfile, save_profile

HIDDEN, LAYERS, EXPERTS, TOP_K, WIDTH, HEADS, HEAD_DIM = 1024, 4, 64, 8, 512, 8, 64
PARAMETERS_BYTES = LAYERS * EXPERTS * 3 * HIDDEN * WIDTH * 2


def write_large_model(folder: Path, tokenizer_of: Path) -> tuple[Path, Path]:
    """Write the model folder (about 0.8 GB, once) and its profile; returns both paths.

    Its similarities are random: they choose which experts replace which, not how many.
    """
    profile = folder / "profile.safetensors"
    if profile.exists():  # written last
        return folder, profile
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tokenizer_of / name, folder / name)
    config = json.loads((tokenizer_of / "config.json").read_text()) | {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": WIDTH,
        "intermediate_size": WIDTH,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(_tensors(config["vocab_size"]), folder / "model.safetensors", {"format": "pt"})
    info = MoeModelInfo.from_folder(folder)
    generator = torch.Generator().manual_seed(1)
    similarity = {}
    for layer in info.layer_ids:
        half = torch.rand(EXPERTS, EXPERTS, generator=generator)
        similarity[layer] = ((half + half.T) / 2).fill_diagonal_(1.0)
    metadata = ProfileMetadata(
        model=folder.name,
        architecture=info.architecture,
        fingerprint=info.fingerprint,
        method="random",
    )
    save_profile(SereProfile(metadata, similarity), profile)
    return folder, profile


def _tensors(vocab: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator).bfloat16()
    made: dict[str, torch.Tensor] = {}

    def random(name: str, *shape: int, std: float) -> None:
        # Slices of one block of noise: making 0.8 GB of it would take longer than the rest.
        size = shape[0] * shape[1]
        at = int(torch.randint(len(noise) - size + 1, (1,), generator=generator))
        made[name] = (noise[at : at + size].view(shape) * std).contiguous()

    random("model.embed_tokens.weight", vocab, HIDDEN, std=1.0)
    random("lm_head.weight", vocab, HIDDEN, std=0.05)
    made["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"{at}.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        for name in ("q", "k", "v", "o"):
            random(f"{at}.self_attn.{name}_proj.weight", HEADS * HEAD_DIM, HIDDEN, std=0.03)
        made[f"{at}.self_attn.o_proj.weight"] = made[f"{at}.self_attn.o_proj.weight"].T.contiguous()
        for name in ("q_norm", "k_norm"):
            made[f"{at}.self_attn.{name}.weight"] = torch.ones(HEAD_DIM, dtype=torch.bfloat16)
        random(f"{at}.mlp.gate.weight", EXPERTS, HIDDEN, std=0.05)
        for e in range(EXPERTS):
            for name in ("gate_proj", "up_proj"):
                random(f"{at}.mlp.experts.{e}.{name}.weight", WIDTH, HIDDEN, std=0.03)
            random(f"{at}.mlp.experts.{e}.down_proj.weight", HIDDEN, WIDTH, std=0.03)
    return made
