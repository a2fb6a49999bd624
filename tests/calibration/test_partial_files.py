"""What ``--resume`` does not believe of an unfinished calibration's file."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from sere_sglang.calibration import CalibrationJob, Interrupted, calibrate
from sere_sglang.calibration.collection import load_partial
from sere_sglang.errors import SereError
from sere_sglang.profile.container import sealed
from tests.calibration.layer_jobs import a_job, same_everywhere, write_float32


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    same_everywhere(monkeypatch)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> CalibrationJob:
    """One that is to be resumed."""
    folder = tmp_path_factory.mktemp("stopped")
    write_float32("qwen3_moe", folder / "qwen3_moe")
    job = a_job(folder / "qwen3_moe", folder / "p.out")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        same_everywhere(patch)
        calibrate(job, stop=lambda: True)
    return dataclasses.replace(job, resume=True)


def _refused(job: CalibrationJob, data: bytes) -> str:
    """What `--resume` says to a partial file of these bytes."""
    whole = job.partial.read_bytes()
    job.partial.write_bytes(data)
    try:
        with pytest.raises(SereError, match=r"^--resume: .*delete it and start without") as error:
            calibrate(job)
    finally:
        job.partial.write_bytes(whole)
    return str(error.value)


def test_a_damaged_partial_file_is_not_continued(stopped: CalibrationJob) -> None:
    whole = stopped.partial.read_bytes()
    for at in (len(whole) - 1, len(whole) // 2, whole.index(b"windows_done")):
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        assert "cannot be read (its checksum is broken)" in _refused(stopped, flipped)
    for torn in (b"", whole[:1000], whole[:-1]):
        assert "cannot be read" in _refused(stopped, torn)
    unsealed = save(load(whole), {"about": json.dumps(load_partial(stopped.partial)[1])})
    assert "its checksum is absent" in _refused(stopped, unsealed)


@pytest.mark.parametrize(
    "about",
    [
        "[" * 100_000,
        "9" * 5000,
        "[]",
        {"windows_done": -1},
        {"windows_done": True},
        {"windows_done": 1 << 40},
        {"layer": None},
        {"layer": "0"},
        {"layer": 99},
        {"spec": []},
    ],
)
def test_a_sealed_partial_file_is_not_believed_either(
    stopped: CalibrationJob, about: str | dict[str, Any]
) -> None:
    tensors, told = load_partial(stopped.partial)
    text = about if isinstance(about, str) else json.dumps({**told, **about})
    assert "cannot be read" in _refused(stopped, sealed(save(tensors, {"about": text})))


def test_tensors_of_no_layer_and_a_pipe_are_refused(
    stopped: CalibrationJob, tmp_path: Path
) -> None:
    tensors, told = load_partial(stopped.partial)
    for name in ("x/gram", "gram", "-1/gram", "01/gram"):
        odd = {**tensors, name: torch.zeros(1)}
        assert "its layers" in _refused(stopped, sealed(save(odd, {"about": json.dumps(told)})))
    os.mkfifo(tmp_path / "p.partial")
    with pytest.raises(SereError, match="it is no regular file"):
        load_partial(tmp_path / "p.partial")
