"""A step of ``launch/gpu_server.py`` on real servers of the CPU engine."""

from __future__ import annotations

from pathlib import Path

from launch.gpu_server_models import TINY, write_model
from launch.gpu_server_steps import Machine, exact, launches
from tests.server.harness import serve


def test_exact(tmp_path: Path) -> None:
    model = write_model(TINY, tmp_path / "model", layers=2)
    seen = exact(Machine(dry=True, serve=serve), model)
    assert seen == {
        "passed": True,
        "off": "plain SGLang's tokens",
        "layers that re-route nothing": [],
    }


def test_launches(tmp_path: Path) -> None:
    model = write_model(TINY, tmp_path / "model", layers=2)
    seen = launches(Machine(dry=True, serve=serve), model)
    assert seen["passed"], seen
