"""The implementations that this machine has become the parameter ``impl`` of a test."""

from __future__ import annotations

import pytest

from sere_sglang.ops import available_impls


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", available_impls("cpu"))
