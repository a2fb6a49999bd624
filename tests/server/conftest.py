"""Servers that several test modules share; each starts when the first test asks for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Nothing here is compiled; without it the processes of a server start in less time.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

from tests.server.checkpoints import write_checkpoint
from tests.server.harness import SERE, Server, serve
from tests.server.profiles import write_profile
from tests.server.shared import SHARE_SERVERS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint("olmoe")`: a tiny random model folder with a profile beside its weights."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(architecture: str) -> Path:
        folder = root / architecture
        if not folder.exists():
            write_checkpoint(architecture, folder)
            if architecture != "dense":
                write_profile(folder)
        return folder

    return get


_SHARED = contextlib.ExitStack()
"""The servers of the fixtures `plain` and `sere`."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """They end behind the files that share them, not with the session: an idle one polls."""
    if nextitem is None or nextitem.path.name not in SHARE_SERVERS:
        _SHARED.close()


@pytest.fixture(scope="session")
def plain(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """SGLang serving the tiny Qwen3-MoE without the flag."""
    log = tmp_path_factory.mktemp("logs") / "plain.log"
    return _SHARED.enter_context(serve(checkpoint("qwen3_moe"), log, fork_workers=False))


@pytest.fixture(scope="session")
def sere(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """The same model with ``--moe-backend sere``, S = 1, rho = 0."""
    log = tmp_path_factory.mktemp("logs") / "sere.log"
    flags = (*SERE, "--enable-metrics")
    return _SHARED.enter_context(serve(checkpoint("qwen3_moe"), log, *flags, fork_workers=False))


@pytest.fixture(autouse=True)
def _settings_as_started(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests change live settings freely."""
    yield
    if "sere" in request.fixturenames:
        request.getfixturevalue("sere").set_sere(
            enabled=True, primary_k=1, threshold=0.0, min_batch=1, max_batch=None
        )
