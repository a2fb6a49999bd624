"""Small profiles for the tests of the file."""

from __future__ import annotations

import torch

from benchmarks._common import random_similarity
from sere_sglang.profile import MoeModelInfo, ProfileMetadata, SereProfile

METADATA = ProfileMetadata(
    model="some/model",
    architecture="SomeMoeForCausalLM",
    num_layers=3,
    num_experts=4,
    top_k=2,
    hidden_size=16,
    method="frobenius",
    method_parameters={"weighting": "all", "measures": ["frobenius", "cka"]},
    data="text.jsonl",
    num_tokens=4096,
    tool_version="0.1.0",
    date="2026-01-31",
)


def a_matrix(experts: int, seed: int) -> torch.Tensor:
    return random_similarity(experts, torch.Generator().manual_seed(seed))


def a_profile(layers: tuple[int, ...] = (0, 2), experts: int = 4) -> SereProfile:
    return SereProfile(
        METADATA,
        {layer: a_matrix(experts, layer) for layer in layers},
        {layer: {"popularity": torch.arange(experts) + 1} for layer in layers},
    )


def a_model(name: str = "the/model", **changes: object) -> MoeModelInfo:
    """Which `a_profile` fits."""
    config = {
        "architectures": ["SomeMoeForCausalLM"],
        "num_hidden_layers": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 16,
        "mlp_only_layers": [1],
        **changes,
    }
    return MoeModelInfo.from_config(config, name=name)
