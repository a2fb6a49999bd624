"""Who runs beside whom: with ``pytest -n``, tests that share something expensive share a worker."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import pytest

from tests.server.shared import SHARE_SERVERS

# Their tests start what they need themselves, and share nothing.
_EACH_ALONE = ("test_start.py", "test_architectures.py")
# Long ones first, so that no worker is left with one at the end.
_FOLDERS = (
    "soak",
    "server",
    "calibration",
    "runtime",
    "cli",
    "schedule",
    "ops",
    "cpu",
    "benchmarks",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[int, bool]:
    folder = item.path.parent.name
    at = _FOLDERS.index(folder) if folder in _FOLDERS else len(_FOLDERS)
    return at, item.path.name not in SHARE_SERVERS


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::", 1)[0]
            name = PurePath(path).name
            if name in SHARE_SERVERS:
                return "shared servers"
            return nodeid if name in _EACH_ALONE else path

    config.option.loadscopereorder = False
    return Scheduling(config, log)
