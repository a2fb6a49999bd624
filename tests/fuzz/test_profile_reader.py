"""A profile from anywhere: equal content, or one refusal; bounded memory, no hang."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sere_sglang.profile import SereProfile, load_profile, save_profile
from sere_sglang.profile.container import LARGEST_FILE, LARGEST_HEADER
from tests.fuzz.outcome import cases, outcome
from tests.fuzz.profile_bytes import damaged, forged, joined, parts_of, unsealed
from tests.profile.samples import a_profile

SEEDS = st.integers(0, 1 << 32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "p.safetensors"
    save_profile(a_profile(), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated") / "p.safetensors"


def _is_sound(profile: SereProfile) -> None:
    """What a server relies on."""
    for matrix in profile.similarity.values():
        assert matrix.dtype == torch.float32 and matrix.shape == (profile.num_experts,) * 2
        assert bool(((matrix >= 0) & (matrix <= 1)).all()) and bool((matrix.diagonal() == 1).all())
    for tables in profile.tables.values():
        assert all(bool(torch.isfinite(table.double()).all()) for table in tables.values())
    assert 0 <= profile.metadata.top_k <= profile.num_experts


@given(seed=SEEDS)
@cases(800)
def test_damage_never_passes(seed: int, whole: bytes, path: Path) -> None:
    data = damaged(whole, random.Random(seed))
    path.write_bytes(data)
    _, refusal = outcome(lambda: load_profile(path))
    if refusal is not None:
        assert str(path) in refusal
    else:
        assert data == whole, "damaged and loaded"


@given(seed=SEEDS)
@cases(800)
def test_what_a_forger_writes_is_sound_or_refused(seed: int, whole: bytes, path: Path) -> None:
    path.write_bytes(forged(whole, random.Random(seed)))
    loaded, refusal = outcome(lambda: load_profile(path))
    if loaded is not None:
        _is_sound(loaded)
    else:
        assert refusal is not None and str(path) in refusal


@given(
    experts=st.integers(0, 5),
    name=st.sampled_from(["similarity", "scale", "popularity", "surrogate_bias", "expert_energy"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]),
    dims=st.integers(0, 3),
    seed=SEEDS,
)
@cases(300)
def test_tables_of_any_shape(
    experts: int, name: str, dtype: torch.dtype, dims: int, seed: int, path: Path
) -> None:
    draw = torch.Generator().manual_seed(seed)
    table = torch.rand([experts] * dims, generator=draw).to(dtype)
    tables = {"layers.0.similarity": torch.eye(4), f"layers.{seed % 2}.{name}": table}
    path.write_bytes(unsealed(tables))
    loaded, _ = outcome(lambda: load_profile(path))
    if loaded is not None:
        _is_sound(loaded)


BOMBS = {
    "deep": b'{"x":' * 100_000,
    "wide": b'{"a":[' + b"[]," * (LARGEST_HEADER // 12) + b"[]]}",
    "long": b'{"__metadata__":{"model":"' + b"x" * (LARGEST_HEADER - 100) + b'"}}',
    "numbers": b'{"a":' + b"9" * (LARGEST_HEADER - 100) + b"}",
    "twice": b'{"a":1,"a":2,"__metadata__":{},"__metadata__":{}}',
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "metadata list": b'{"__metadata__":[1]}',
    "metadata number": b'{"__metadata__":{"top_k":2}}',
    "surrogate": b'{"\\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
    "no utf-8": b'{"\xff\xfe":1}',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_header_bombs(bomb: str, path: Path) -> None:
    path.write_bytes(joined(BOMBS[bomb], b"\0" * 64))
    tracemalloc.start()
    try:
        loaded, refusal = outcome(lambda: load_profile(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert loaded is None and refusal is not None
    assert peak < 200 << 20, f"{peak >> 20} MiB for {path.stat().st_size >> 20}"


@pytest.mark.parametrize("shape", [[22000, 22000], [1 << 62], [1 << 31, 1 << 31], [2] * 64])
def test_two_gigabytes_that_are_not_there(shape: list[int], whole: bytes, path: Path) -> None:
    header, tensors = parts_of(whole)
    size = 4
    for n in shape:
        size *= n
    header["layers.0.similarity"] |= {"shape": shape, "data_offsets": [0, size]}
    path.write_bytes(joined(header, tensors))
    _refused_within(path, 4 << 20)


def test_two_gigabytes_of_nothing_are_not_read(whole: bytes, path: Path) -> None:
    """As long as a profile may be, but its header speaks of less."""
    path.write_bytes(whole)
    os.truncate(path, LARGEST_FILE)
    try:
        _refused_within(path, 4 << 20)
    finally:
        path.unlink()


def _refused_within(path: Path, most: int) -> None:
    tracemalloc.start()
    try:
        loaded, refusal = outcome(lambda: load_profile(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert loaded is None and refusal is not None and str(path) in refusal
    assert peak < most, f"{peak >> 20} MiB"


@given(name=st.text(max_size=300), parts=st.integers(1, 40))
@cases(100)
def test_any_name_of_a_file(name: str, parts: int) -> None:
    loaded, refusal = outcome(lambda: load_profile("/nonexistent/" + "/".join([name] * parts)))
    assert loaded is None and refusal is not None


def test_links(whole: bytes, tmp_path: Path) -> None:
    """A link to a profile is one, as hubs keep them; others are refused."""
    target = tmp_path / "blob"
    target.write_bytes(whole)
    for name, to in {"good": target, "zero": "/dev/zero", "memory": "/proc/self/mem",
                     "terminal": "/dev/tty", "self": tmp_path / "self", "gone": "gone2",
                     "folder": tmp_path, "random": "/dev/urandom"}.items():  # fmt: skip
        link = tmp_path / name
        link.symlink_to(str(to))
        loaded, refusal = outcome(lambda link=link: load_profile(link))  # type: ignore[misc]
        assert (loaded is not None) == (name == "good"), (name, refusal)


def test_the_unchanged_file_loads(whole: bytes, path: Path) -> None:
    path.write_bytes(whole)
    loaded = load_profile(path)
    _is_sound(loaded)
    assert json.dumps(sorted(loaded.similarity)) == "[0, 2]"
