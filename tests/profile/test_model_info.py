"""Which layers of a model have experts: by each family's own words, or by the loaded model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sere_sglang.errors import SereError
from sere_sglang.profile import (
    LOADED_LAYERS,
    MoeModelInfo,
    ProfileError,
    ProfileMetadata,
    SereProfile,
    check_profile_fits,
)

LAYERS = 6


def _info(**config: Any) -> MoeModelInfo:
    shape = {"num_hidden_layers": LAYERS, "num_experts": 8, "num_experts_per_tok": 2}
    given = {"architectures": ["SomeMoe"], "hidden_size": 16, **shape, **config}
    return MoeModelInfo.from_config(given, name="a model")


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"mlp_only_layers": [0, 3]}, (1, 2, 4, 5)),
        ({"first_k_dense_replace": 2}, (2, 3, 4, 5)),
        ({"num_dense_layers": 2}, (2, 3, 4, 5)),  # LFM2-MoE
        ({"decoder_sparse_step": 2}, (1, 3, 5)),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1]}, (1, 2, 4, 5)),
        ({"mlp_layer_types": ["dense", *["sparse"] * 5]}, (1, 2, 3, 4, 5)),  # Laguna, Mellum
        ({"hybrid_override_pattern": "M*EME-"}, (2, 4)),  # Nemotron-H
        ({"is_moe_layer": [False, True] * 3}, (1, 3, 5)),  # EXAONE-MoE
        ({"moe_layer_start_index": 1, "moe_layer_interval": 2}, (1, 3, 5)),  # ERNIE 4.5
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 3}, (1, 2, 3)),
        ({"num_experts_per_tok": None, "moe_k": 2}, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_each_family_says_it_its_own_way(config: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert _info(**config).layer_ids == layers


@pytest.mark.parametrize(
    "config",
    [
        {"num_experts": [64, 64]},  # ERNIE-VL: text and vision
        {"num_experts_per_tok": None, "moe_topk": [2] * LAYERS},  # HunYuan
        {"num_experts": None, "num_experts_per_tok": None, "ffn_config": {"moe_top_k": 4}},  # DBRX
    ],
)
def test_what_a_config_does_not_say_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(SereError, match="is a dense model"):
        _info(**config)


def test_a_profile_with_the_loaded_models_layers_is_taken_at_its_word() -> None:
    stated = _info()  # a rule that nobody here knows: all layers
    loaded = stated.with_loaded([5, 2])
    assert loaded.layers_are_loaded and loaded.layer_ids == (2, 5)
    assert stated.with_loaded(range(LAYERS)) is stated

    parameters = {LOADED_LAYERS: True}
    meta = ProfileMetadata(fingerprint=loaded.fingerprint, method_parameters=parameters)
    eye = torch.eye(8)
    profile = SereProfile(meta, {2: eye, 5: eye})
    check_profile_fits(profile, stated, Path("p"))
    with pytest.raises(ProfileError, match="config fingerprint"):  # of another shape
        check_profile_fits(profile, _info(hidden_size=32), Path("p"))
    profile.metadata = dataclasses.replace(meta, method_parameters={})
    with pytest.raises(ProfileError, match=r"MoE layers: profile \[2, 5\]"):
        check_profile_fits(profile, stated, Path("p"))
