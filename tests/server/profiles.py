"""Random similarity profiles that fit the tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks._common import random_similarity
from sere_sglang.profile import (
    DEFAULT_FILE_NAME,
    MoeModelInfo,
    ProfileMetadata,
    SereProfile,
    save_profile,
)


def random_profile(model: Path, *, seed: int = 0) -> SereProfile:
    info = MoeModelInfo.from_folder(model)
    generator = torch.Generator().manual_seed(seed)
    similarity = {}
    for layer in info.layer_ids:
        similarity[layer] = random_similarity(info.num_experts, generator)
    metadata = ProfileMetadata(
        model=str(model),
        architecture=info.architecture,
        fingerprint=info.fingerprint,
        weights=info.weights,
        num_layers=len(info.layer_ids),
        num_experts=info.num_experts,
        top_k=info.top_k,
        hidden_size=info.hidden_size,
        method="random",
    )
    return SereProfile(metadata, similarity)


def without_profile(model: Path, folder: Path) -> Path:
    """`folder`, with links to the files of `model` but for its profile."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name != DEFAULT_FILE_NAME:
            (folder / file.name).symlink_to(file)
    return folder


def write_profile(model: Path, path: Path | None = None) -> Path:
    """Beside the weights, where the server looks for it, unless `path` is given."""
    path = path or model / DEFAULT_FILE_NAME
    save_profile(random_profile(model), path)
    return path
