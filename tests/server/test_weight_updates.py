"""Weights that our CPU runner has packed, as SGLang reads and changes them in a running server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch

from tests.server.harness import Server, serve

PROMPTS = [f"request number {i} " * (1 + i % 3) for i in range(6)]
TOKENS = 8


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3_moe")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--moe-backend=sere", "--sere-primary-k=1")
    with serve(model, tmp_path_factory.mktemp("weights") / "sere.log", *flags) as server:
        yield server


def _tokens(server: Server) -> list[list[int]]:
    return [answer["output_ids"] for answer in server.generate(PROMPTS, TOKENS)]


def _checksums(server: Server) -> dict[str, str]:
    (rank,) = server.post("/weights_checker", {"action": "checksum"})["ranks"]
    return rank["checksums"]


def _update(server: Server, model: Path) -> None:
    assert server.post("/update_weights_from_disk", {"model_path": str(model)})["success"]


def test_weights_are_read_as_they_were_loaded(server: Server, model: Path, tmp_path: Path) -> None:
    answers = _tokens(server)
    packed = _checksums(server)
    assert any("experts.w13_weight" in name for name in packed)
    assert _tokens(server) == answers, "packed again"
    with serve(model, tmp_path / "plain.log") as plain:
        assert _checksums(plain) == packed


def test_weights_are_updated(server: Server, model: Path, tmp_path: Path) -> None:
    answers = _tokens(server)
    _update(server, model)
    assert _tokens(server) == answers
    other = _with_other_experts(model, tmp_path / "other")
    _update(server, other)
    changed = _tokens(server)
    assert changed != answers
    with serve(other, tmp_path / "other.log", "--moe-backend=sere", "--sere-primary-k=1") as fresh:
        assert _tokens(fresh) == changed
    _update(server, model)
    assert _tokens(server) == answers


def _with_other_experts(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
            continue
        tensors = safetensors.torch.load_file(file)
        for name in tensors:
            if ".mlp.experts." in name:
                tensors[name] = tensors[name].flip(0).contiguous()
        safetensors.torch.save_file(tensors, folder / file.name)
    return folder
