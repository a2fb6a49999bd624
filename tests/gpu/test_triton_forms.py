"""Triton's forms beyond the sizes that the shared cases reach: many tiles, many programs.

On a GPU, or on a CPU under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from sere_sglang.ops.triton import reroute as implementation
from tests.ops import cases
from tests.ops.cases import Spec

if implementation.phases.INTERPRETED:
    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    pytest.skip("needs a CUDA GPU or TRITON_INTERPRET=1", allow_module_level=True)

SPECS = [
    Spec(num_tokens=50, num_experts=40, top_k=6, classes=((1, 0.4),), holes=0.1),
    Spec(num_tokens=50, num_experts=40, top_k=5, num_valid=37, classes=((2, 0.0),), scale=True),
    Spec(num_tokens=33, num_valid=20, holes=0.6, classes=((1, 0.0), (3, 0.7)), row_classes=True),
    Spec(num_tokens=40, num_valid=11, holes=1.0),
    Spec(num_tokens=40, num_valid=0),
    Spec(num_tokens=20, enabled=False, num_valid=3),
    Spec(num_tokens=20, classes=((0, 0.0),), num_valid=3),
    Spec(num_tokens=20, num_experts=1, top_k=1),
    Spec(num_tokens=30, ranked=True, extra_columns=2, weight_levels=2),
    *(cases.random_spec(random.Random(seed), 60, 70) for seed in range(12)),
]


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
@pytest.mark.parametrize("one_program", [True, False], ids=["one program", "many programs"])
def test_many_tiles_equal_the_oracle(
    one_program: bool, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small tiles make the small cases take many turns, or many programs."""
    if one_program and torch.version.hip:
        pytest.skip("AMD uses many programs only")
    monkeypatch.setattr(implementation, "SMALL_TILE_SLOTS", 128)
    monkeypatch.setattr(implementation, "LARGE_TILE_SLOTS", 128)
    monkeypatch.setattr(implementation, "MATCH_TILE", 256)
    monkeypatch.setattr(implementation, "ONE_PROGRAM_SLOTS", 2**30 if one_program else 0)
    cases.check(cases.make_case(spec), "triton", DEVICE)
