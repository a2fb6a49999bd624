"""The demo model with its experts padded by zeros to a real model's size.

It computes what the demo model computes, so its quality is the demo model's; but a decode step
reads experts of megabytes, as real models do, instead of spending its time elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sere_sglang.profile import load_profile, save_profile

WIDTH = 6144  # of an expert; with the demo model's 256 hidden units 9.4 MB in bfloat16
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_padded_model(
    folder: Path, source: Path, profile: Path, width: int = WIDTH
) -> tuple[Path, Path]:
    """Write the model folder (1.2 GB, once) and its profile; returns both paths."""
    own_profile = folder / "profile.safetensors"
    if own_profile.exists() and _width(folder) == width:  # the profile is written last
        _write_profile(profile, folder.name, own_profile)
        return folder, own_profile
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in _COPIED:
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    config = json.loads((source / "config.json").read_text())
    config["moe_intermediate_size"] = width
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    with safe_open(source / "model.safetensors", framework="pt") as file:
        padded = {name: _padded(name, file.get_tensor(name), width) for name in file.keys()}  # noqa: SIM118
    save_file(padded, folder / "model.safetensors", {"format": "pt"})
    _write_profile(profile, folder.name, own_profile)
    return folder, own_profile


def _write_profile(source: Path, model: str, path: Path) -> None:
    """The same tables; only the bytes of the checkpoint are others."""
    found = load_profile(source)
    found.metadata = dataclasses.replace(found.metadata, model=model, weights="")
    save_profile(found, path)


def _width(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["moe_intermediate_size"])


def _padded(name: str, weight: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of gate and up, columns of down: an added neuron is 0 and is multiplied by 0."""
    if ".mlp.experts." not in name:
        return weight
    shape = list(weight.shape)
    side = 1 if "down_proj" in name else 0
    shape[side] = width
    padded = torch.zeros(shape, dtype=weight.dtype)
    padded.narrow(side, 0, weight.shape[side]).copy_(weight)
    return padded
