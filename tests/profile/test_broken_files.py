"""What is no profile, or no longer the one that was written, is refused by name."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sere_sglang.profile import (
    FORMAT_VERSION,
    ProfileError,
    find_profile,
    load_profile,
    save_profile,
)
from tests.profile.samples import a_matrix, a_model, a_profile


def _write_text(path: Path) -> None:
    path.write_text("not a profile at all")


def _write_truncated(path: Path) -> None:
    save_profile(a_profile(), path)
    path.write_bytes(path.read_bytes()[:-10])


def _write_pickle(path: Path) -> None:
    torch.save({"layers.0.similarity": a_matrix(4, 0)}, path)


def _write_newer(path: Path) -> None:
    newer = str(int(FORMAT_VERSION.split(".")[0]) + 1) + ".0"
    save_file({"layers.0.similarity": a_matrix(4, 0)}, path, metadata={"format_version": newer})


def _write_matrix(path: Path, change: str) -> None:
    matrix = a_matrix(4, 0)
    if change == "nan":
        matrix[1, 2] = float("nan")
    elif change == "above":
        matrix[1, 2] = 1.5
    elif change == "diagonal":
        matrix[3, 3] = 0.5
    elif change == "half":
        matrix = matrix.to(torch.float16)
    elif change == "shape":
        matrix = matrix[:, :3].contiguous()
    save_file({"layers.0.similarity": matrix}, path)


def _write_uneven(path: Path) -> None:
    tensors = {"layers.0.similarity": a_matrix(4, 0), "layers.1.similarity": a_matrix(5, 0)}
    save_file(tensors, path)


def _write_header(path: Path, length: int) -> None:
    path.write_bytes(length.to_bytes(8, "little") + b"{}" * 50)


def _write_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write((2).to_bytes(8, "little") + b"{}")
        file.truncate(8 << 30)


def _write_claim(path: Path) -> None:
    """A matrix of 2 GB, none of which is there."""
    about = {"dtype": "F32", "shape": [22000, 22000], "data_offsets": [0, 4 * 22000**2]}
    header = json.dumps({"layers.0.similarity": about}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def _write_bomb(path: Path) -> None:
    header = b'{"x":' + b"[" * 100_000
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def _write_link_to_a_folder(path: Path) -> None:
    path.symlink_to(path.parent, target_is_directory=True)


def _write_without_checksum(path: Path) -> None:
    save_file({"layers.0.similarity": a_matrix(4, 0)}, path, metadata={"format_version": "1.1"})


def _write_appended(path: Path) -> None:
    """Metadata changed by a tool that knows nothing of the checksum."""
    save_profile(a_profile(), path)
    path.write_bytes(path.read_bytes().replace(b"text.jsonl", b"TEXT.jsonl"))


def _write_metadata(path: Path, **metadata: str) -> None:
    save_file({"layers.0.similarity": a_matrix(4, 0)}, path, metadata=metadata)


BROKEN = {
    "no file": (lambda path: None, "sere-sglang calibrate"),
    "text": (_write_text, "not a readable safetensors file"),
    "truncated": (_write_truncated, "not a readable safetensors file"),
    "pickle": (_write_pickle, "not a readable safetensors file"),
    "newer major version": (_write_newer, "upgrade sere-sglang"),
    "no similarity": (lambda path: save_file({"x": torch.ones(1)}, path), "SERE profile?"),
    "NaN": (lambda path: _write_matrix(path, "nan"), r"holds NaN .* at \[1, 2\]"),
    "above 1": (lambda path: _write_matrix(path, "above"), r"outside \[0, 1\] \(1.5 at"),
    "diagonal": (lambda path: _write_matrix(path, "diagonal"), "expert 3 is 0.5 similar to itself"),
    "dtype": (lambda path: _write_matrix(path, "half"), "expected float32 or bfloat16"),
    "shape": (lambda path: _write_matrix(path, "shape"), r"expected \[E, E\]"),
    "uneven": (_write_uneven, "disagree about the number of experts"),
    "header longer than the file": (lambda p: _write_header(p, 1 << 62), "longer than the file"),
    "header of all": (lambda p: _write_header(p, 200), "not a readable safetensors file"),
    "eight gigabytes of holes": (_write_sparse, "has 8192 MiB, a profile at most"),
    "two gigabytes claimed": (_write_claim, "not a readable safetensors file"),
    "a deep header": (_write_bomb, "not a readable safetensors file"),
    "a named pipe": (os.mkfifo, "is no regular file"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
    "link to a folder": (_write_link_to_a_folder, "is a folder"),
    "link to itself": (lambda path: path.symlink_to(path), "cannot be opened"),
    "no checksum": (_write_without_checksum, "has a checksum and this file has none"),
    "edited": (_write_appended, "is damaged, its checksum is not that of its content"),
    "no version": (lambda p: _write_metadata(p, format_version="²"), "is not a version"),
    "top_k": (
        lambda p: _write_metadata(p, top_k="[2]"),
        "metadata top_k = '\\[2\\]' cannot be read",
    ),
    "large top_k": (lambda p: _write_metadata(p, top_k="9"), "metadata top_k 9 is more than its 4"),
    "negative": (lambda p: _write_metadata(p, num_tokens="-1"), "metadata num_tokens"),
    "digits": (lambda p: _write_metadata(p, num_tokens="1" * 5000), "metadata num_tokens"),
    "parameters": (lambda p: _write_metadata(p, method_parameters="[" * 9000), "cannot be read"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, how: str) -> None:
    path = tmp_path / "broken.safetensors"
    write, message = BROKEN[how]
    write(path)
    with pytest.raises(ProfileError, match=message) as error:
        load_profile(path)
    assert str(path) in str(error.value)


def test_metadata_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_file({"layers.0.similarity": a_matrix(4, 0)}, path, metadata={"num_tokens": "many"})
    with pytest.raises(ProfileError, match="num_tokens"):
        load_profile(path)


def test_format_1_0_is_still_read(tmp_path: Path) -> None:
    """As it was written before there were checksums, and as other tools write it."""
    path = tmp_path / "p.safetensors"
    matrix = a_matrix(4, 0)
    _write_metadata(path, format_version="1.0", top_k="2", model="theirs")
    assert load_profile(path).metadata.format_version == "1.0"
    save_file({"layers.0.similarity": matrix}, path)
    assert load_profile(path).metadata.format_version == "1.0"


FLIPPED_FILES = 600


def test_every_damaged_file_is_refused(tmp_path: Path) -> None:
    """1 to 3 flipped bits anywhere, the header as often as the data."""
    path = tmp_path / "p.safetensors"
    profile = a_profile(tuple(range(3)), experts=8)
    save_profile(profile, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(11)
    for case in range(FLIPPED_FILES):
        damaged = bytearray(whole)
        area = (0, header) if case % 2 else (header, len(whole))
        for bit in chance.sample(range(8 * area[0], 8 * area[1]), 1 + case % 3):
            damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ProfileError, match=re.escape(str(path))):
            load_profile(path)
    path.write_bytes(whole)
    assert torch.equal(load_profile(path).similarity[2], profile.similarity[2])


def test_damage_does_not_turn_a_file_into_one_of_the_old_format(tmp_path: Path) -> None:
    """The flips that would do it: version, name of the checksum, its mark."""
    path = tmp_path / "p.safetensors"
    save_profile(a_profile(), path)
    whole = path.read_bytes()
    old = whole.replace(b'"format_version":"1.1"', b'"format_version":"1.0"')
    for before, after in ((b'"checksum"', b'"cHecksum"'), (b"sere-sha256:", b"Sere-sha256:")):
        old = old.replace(before, after)
        path.write_bytes(old)
        with pytest.raises(ProfileError, match="is damaged"):
            load_profile(path)


def test_single_bits_of_every_header_byte(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_profile(a_profile((0,)), path)
    whole = path.read_bytes()
    for at in range(8 + int.from_bytes(whole[:8], "little")):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(ProfileError):
            load_profile(path)


@pytest.mark.parametrize("name", ["x" * 5000, "x\0y", "x/" * 3000])
def test_a_name_that_no_file_can_have(name: str) -> None:
    with pytest.raises(ProfileError, match=r"--sere-profile x.*no such file") as error:
        find_profile(a_model("some/moe"), name)
    assert len(str(error.value)) < 700
    with pytest.raises(ProfileError, match="cannot be opened"):
        load_profile(name)
