"""The profile file: what is written is what is read; whose model it fits; where it is found."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from sere_sglang.ops import LayerTable
from sere_sglang.profile import (
    MoeModelInfo,
    ProfileError,
    ProfileMetadata,
    SereProfile,
    check_profile_fits,
    load_profile,
    save_profile,
)
from sere_sglang.profile.container import sealed
from tests.profile.samples import METADATA, a_matrix, a_model, a_profile


@given(
    st.sets(st.integers(0, 120), min_size=1, max_size=6),
    st.integers(1, 40),
    st.text(max_size=20),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    layers: set[int],
    experts: int,
    data: str,
    parameters: dict[str, object],
) -> None:
    path = tmp_path_factory.mktemp("round") / "profile.safetensors"
    written = a_profile(tuple(layers), experts)
    top_k = min(experts, METADATA.top_k)
    written.metadata = dataclasses.replace(
        METADATA, data=data, method_parameters=parameters, top_k=top_k
    )
    save_profile(written, path)
    read = load_profile(path)
    assert read.metadata == written.metadata
    assert list(read.similarity) == sorted(layers)
    assert all(torch.equal(read.similarity[i], written.similarity[i]) for i in layers)
    assert all(torch.equal(read.tables[i]["popularity"], torch.arange(experts) + 1) for i in layers)


def test_the_same_profile_gives_the_same_bytes_and_leaves_nothing_else(tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_profile(a_profile((0, 2)), a)
    save_profile(a_profile((2, 0)), b)
    assert a.read_bytes() == b.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    with safe_open(a, framework="pt") as file:
        fields = {f.name for f in dataclasses.fields(ProfileMetadata)}
        assert set(file.metadata()) == fields - {"tuning"} | {"checksum"}
        assert "layers.2.similarity" in file.keys()  # noqa: SIM118


def test_bfloat16_similarities_are_read_as_float32(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    matrix = a_matrix(4, 0).to(torch.bfloat16)
    save_file({"layers.0.similarity": matrix}, path)
    assert torch.equal(load_profile(path).similarity[0], matrix.float())


def test_what_is_unknown_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    tensors = {
        "layers.0.similarity": a_matrix(4, 0),
        "layers.0.surrogate": torch.full((2, 3, 5), float("nan"), dtype=torch.float8_e4m3fn),
        "layers.7.later": torch.ones(0),
        "something.else": torch.ones(2),
    }
    path.write_bytes(sealed(save(tensors, {"format_version": "1.7", "later": "x"})))
    read = load_profile(path)
    assert list(read.similarity) == [0] and not read.tables


def _profile_for(model: MoeModelInfo) -> SereProfile:
    profile = a_profile()
    profile.metadata = dataclasses.replace(METADATA, fingerprint=model.fingerprint)
    return profile


def test_a_profile_fits_the_model_it_was_made_for() -> None:
    check_profile_fits(_profile_for(a_model()), a_model(), Path("p"))


@pytest.mark.parametrize(
    ("changes", "both_sides"),
    [
        ({"num_experts": 8}, "experts: profile 4, model 8"),
        ({"mlp_only_layers": []}, r"MoE layers: profile \[0, 2\], model \[0, 1, 2\]"),
        ({"num_experts_per_tok": 3}, "experts per token: profile 2, model 3"),
        ({"hidden_size": 32}, "hidden size: profile 16, model 32"),
        (
            {"architectures": ["OtherMoe"]},
            "architecture: profile SomeMoeForCausalLM, model OtherMoe",
        ),
        ({"num_hidden_layers": 4, "mlp_only_layers": [1, 3]}, "config fingerprint: profile"),
    ],
)
def test_a_profile_of_another_model_is_refused_with_both_sides(
    changes: dict[str, Any], both_sides: str
) -> None:
    with pytest.raises(ProfileError, match=both_sides) as error:
        check_profile_fits(_profile_for(a_model()), a_model(**changes), Path("some.safetensors"))
    assert "--sere-profile some.safetensors" in str(error.value)
    assert "sere-sglang calibrate --model the/model" in str(error.value)


def test_other_weights_in_the_same_shape_are_refused(tmp_path: Path) -> None:
    prints = {}
    for name, seed in (("one", 0), ("two", 1)):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"w": a_matrix(200, seed)}, folder / "model.safetensors")
        prints[name] = dataclasses.replace(a_model(), name=str(folder)).weights
    model = dataclasses.replace(a_model(), name=str(tmp_path / "one"))
    profile = _profile_for(model)
    profile.metadata = dataclasses.replace(profile.metadata, weights=prints["one"])
    check_profile_fits(profile, model, Path("p"))
    profile.metadata = dataclasses.replace(profile.metadata, weights=prints["two"])
    with pytest.raises(ProfileError, match=f"weights: profile {prints['two']}, model"):
        check_profile_fits(profile, model, Path("p"))


def test_a_server_keeps_little_of_a_large_profile(tmp_path: Path) -> None:
    """48 layers of 128 experts with every table: read, checked, and its tables built."""
    path = tmp_path / "p.safetensors"
    profile = a_profile(tuple(range(48)), experts=128)
    for layer, matrix in profile.similarity.items():
        for measure in ("cosine", "residual", "cka", "cka_rbf", "cka_polynomial"):
            profile.tables[layer][f"similarity_{measure}"] = matrix.clone()
        profile.tables[layer]["scale"] = matrix.clone()
        profile.tables[layer]["coactivation"] = torch.zeros(128, 128, dtype=torch.int64)
    save_profile(profile, path)
    read = load_profile(path)
    tables = [LayerTable.build(matrix) for matrix in read.similarity.values()]
    # A rank keeps the similarity that was read, not a second one, and half of it in neighbours.
    pairs = zip(tables, read.similarity.values(), strict=True)
    assert all(table.similarity.data_ptr() == matrix.data_ptr() for table, matrix in pairs)
    kept = [(t.similarity, t.neighbors) for t in tables]
    assert sum(x.nbytes for pair in kept for x in pair if x is not None) < 5 << 20
