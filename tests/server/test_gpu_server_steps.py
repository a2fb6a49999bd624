"""A step of ``launch/gpu_server.py`` on real servers of the CPU engine."""

from __future__ import annotations

from pathlib import Path

from launch.gpu_moe_layer import TOLERANCE
from launch.gpu_server_models import TINY, write_model
from launch.gpu_server_steps import Machine, exact, launches, ranks, runners, wide_layer
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


def test_runners(tmp_path: Path) -> None:
    """The CPU engine's one, beside a plain MoE in torch on the re-routed ids."""
    model = write_model(TINY, tmp_path / "model", layers=2)
    seen = runners(Machine(dry=True, serve=serve), model)
    assert seen["passed"], seen
    layer = seen["runners"]["auto"]["layer"]
    ((_, worst),) = layer["worst"].items()
    assert 0 < worst["far"] < TOLERANCE / 2 and layer["distinct"]
    assert set(seen["runners"]["auto"]["answers"]) == {"off", "S=1"}


def test_ten_slots_a_row(tmp_path: Path) -> None:
    model = write_model(TINY, tmp_path / "model", layers=2)
    seen = wide_layer(Machine(dry=True, serve=serve), model, "--moe-runner-backend=auto")
    assert seen["passed"], seen
    assert seen["cases"]["1 apart, S=off"]["active"] == 10


def test_two_ranks(tmp_path: Path) -> None:
    model = write_model(TINY, tmp_path / "model", layers=2)
    seen = ranks(Machine(dry=True, serve=serve), model)
    assert seen["passed"], seen
    assert seen["apart"] == [] and seen["rerouted"] > 0


def test_one_gpu_cannot_compare_ranks() -> None:
    machine = Machine(dry=False, serve=serve)
    machine.gpus = 1
    seen = ranks(machine, Path("no model"))
    assert seen["skipped"] == "--tp-size 2 needs two GPUs, this machine has 1"
