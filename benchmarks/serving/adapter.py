"""A small random LoRA adapter for a model of this repository, in the form of PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

_RANK, _SCALE = 4, 0.02


def write_adapter(model: Path, folder: Path) -> Path:
    """`folder`, with an adapter on the attention of every layer of `model`."""
    config = json.loads((model / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    width, kv_width = (config[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))
    shapes = {"q_proj": (width, hidden), "k_proj": (kv_width, hidden)}
    shapes |= {"v_proj": shapes["k_proj"], "o_proj": (hidden, width)}
    made = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for part in shapes:
            outputs, inputs = shapes[part]
            name = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            for matrix, shape in (("A", (_RANK, inputs)), ("B", (outputs, _RANK))):
                values = _SCALE * torch.randn(shape, generator=made)
                tensors[f"{name}.lora_{matrix}.weight"] = values
    folder.mkdir(parents=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    about = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 2 * _RANK, "bias": "none"}
    about |= {"target_modules": list(shapes), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder
