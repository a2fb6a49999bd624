"""A small profile with what every profile of today has."""

from __future__ import annotations

import torch

from benchmarks._common import random_similarity
from sere_sglang.profile import ProfileMetadata, SereProfile


def a_profile(seed: int = 0, experts: int = 6) -> SereProfile:
    generator = torch.Generator().manual_seed(seed)
    similarity, tables = {}, {}
    for layer in (0, 3):
        similarity[layer] = random_similarity(experts, generator)
        by_rank = torch.stack([torch.randperm(experts, generator=generator) for _ in range(2)])
        tables[layer] = {
            "similarity_cka_rbf": similarity[layer].clone(),
            "popularity": by_rank.sum(0),
            "popularity_by_rank": by_rank,
        }
    tokens = int(by_rank.sum(1)[0])
    metadata = ProfileMetadata(model="a/model", method="frobenius", num_tokens=tokens, top_k=2)
    return SereProfile(metadata, similarity, tables)
