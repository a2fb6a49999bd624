"""Every architecture of SGLang's standard top-k path serves on the CPU engine, with and without."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server.checkpoints import MOE_ARCHITECTURES
from tests.server.checks import assert_same, exact_then_rerouted
from tests.server.harness import SERE, serve


@pytest.mark.parametrize("architecture", [a for a in MOE_ARCHITECTURES if a != "qwen3_moe"])
def test_serves_and_reroutes(
    architecture: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = checkpoint(architecture)
    with ExitStack() as stack:
        sere = stack.enter_context(serve(model, tmp_path / "sere.log", *SERE))
        exact = exact_then_rerouted(sere, architecture)
        # One more server per architecture: all of them with SERE_TEST_PLAIN=all.
        if os.environ.get("SERE_TEST_PLAIN") == "all":
            plain = stack.enter_context(serve(model, tmp_path / "plain.log"))
            assert_same(plain, exact)
