"""Tiny checkpoints in float32 and calibrations of them by layers, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sere_sglang.calibration import CalibrationJob
from sere_sglang.calibration.collection import MEASURES, CollectionSpec
from tests.server.checkpoints import write_checkpoint

TOKENS, LENGTH, CKA_TOKENS = 300, 64, 200


def write_float32(architecture: str, folder: Path) -> Path:
    """Rounding to bfloat16 would hide small mistakes."""
    config = write_checkpoint(architecture, folder) / "config.json"
    config.write_text(config.read_text().replace("bfloat16", "float32"))
    return folder


def same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same day, and the environment afterwards as before a CPU was chosen."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")


def a_job(model: Path, out: Path, **changes: Any) -> CalibrationJob:
    spec = CollectionSpec(measures=MEASURES, memory=1 << 21, cka_tokens=CKA_TOKENS)
    settings = {"num_tokens": TOKENS, "length": LENGTH, "device": "cpu", **changes}
    return CalibrationJob(
        model=str(model), out=out, **{"spec": spec, "layer_by_layer": True, **settings}
    )
