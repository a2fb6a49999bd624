"""Shares the oracle and the cases of tests/ops; skips what this machine cannot run, saying why."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.gpu.shared import not_for_this_gpu

NO_GPU = "no CUDA GPU on this machine; `bash launch/gpu_check.sh` on one runs these tests"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")


@functools.cache
def why_not_built(name: str, fused: bool) -> str | None:
    """The error, asked for once: a build that fails takes as long as one that does not."""
    from sere_sglang.ops import fused as fused_form
    from sere_sglang.ops.dispatch import load_impl

    try:
        load_impl(name, "cuda")
        if fused:
            fused_form.build()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def built(name: str, fused: bool) -> str:
    """`name`; one that does not build fails its tests: a GPU machine must have it."""
    reason = not_for_this_gpu(name)
    if reason is not None:
        pytest.skip(reason)
    error = why_not_built(name, fused)
    if error is not None:
        pytest.fail(error, pytrace=False)
    return name


@pytest.fixture(params=["cuda", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """A GPU implementation."""
    return built(request.param, fused=False)


@pytest.fixture(params=["cuda", "auto"])
def fused_impl(request: pytest.FixtureRequest) -> str:
    """How the fused form is asked for."""
    return request.param if request.param == "auto" else built(request.param, fused=True)
