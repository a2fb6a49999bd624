"""Shares the oracle and the cases of tests/ops; skips what this machine cannot run, saying why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

NO_GPU = "no CUDA GPU on this machine; `bash launch/gpu_check.sh` on one runs these tests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")


@pytest.fixture(params=["cuda", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """A GPU implementation. One that does not build fails its tests: a GPU machine must have it."""
    from sere_sglang.ops.dispatch import UnavailableError, load_impl

    try:
        load_impl(request.param, "cuda")
    except UnavailableError as error:
        pytest.skip(str(error))
    return request.param
