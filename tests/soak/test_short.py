"""The soaks, short: the same code on a small model for seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.harness import Forked, Server, serve
from tests.soak import commands, full_disk, kill_and_resume, live_settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("soak")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    model = kill_and_resume.served_model(folder)
    log = folder / "server.log"
    with serve(model, log, *kill_and_resume.flags(model), whole_batches=False) as server:
        yield server


def test_live_settings(server: Server) -> None:
    """Memory is not judged: half a minute is all warming up."""
    report = live_settings.run(server, server.pid, 12, 6)
    live_settings.show(report)
    assert not report.failures, report.failures[:5]
    assert report.tally.complete > 5 and report.changes > 5
    assert sum(s.last_mib - s.first_mib for s in report.memory) < 500
    server.set_sere(
        enabled=True, policy="static", rule="similarity", primary_k=1, threshold=0.0, min_batch=1,
        max_batch=None,
    )  # fmt: skip


def test_profile_replaced(server: Server, folder: Path) -> None:
    kill_and_resume.profile_replaced(server, folder / "served" / "sere_profile.safetensors")


def test_scheduler_stopped(server: Server) -> None:
    kill_and_resume.scheduler_stopped(server, 1.0)


def test_scheduler_killed(folder: Path) -> None:
    kill_and_resume.scheduler_killed(folder, _start)


@pytest.mark.parametrize("trace", ["/dev/full", "/proc/nowhere/trace.jsonl"])
def test_trace_cannot_be_written(folder: Path, trace: str) -> None:
    kill_and_resume.trace_cannot_be_written(folder, trace, _start)


def test_calibrate_killed(tmp_path: Path) -> None:
    command = commands.calibrate(kill_and_resume.calibrated_model(tmp_path))
    kill_and_resume.killed_and_resumed(command, tmp_path / "out", 2, _start)
    kill_and_resume.two_at_once(command, tmp_path / "two", _start)


@pytest.mark.parametrize("command", [commands.evaluate, commands.tune])
def test_a_command_on_a_server_killed(
    server: Server, tmp_path: Path, command: Callable[[Server], commands.Command]
) -> None:
    kill_and_resume.killed_and_resumed(command(server), tmp_path / "out", 1, _start)


@pytest.mark.skipif(not full_disk.can_mount(), reason="only root may mount a small disk")
@pytest.mark.parametrize("name", ["calibrate", "evaluate", "tune", "simulate", "inspect"])
def test_full_disk(server: Server, folder: Path, tmp_path: Path, name: str) -> None:
    command = full_disk.commands(server, folder)[name]
    full_disk.filled_up(command, tmp_path / "disk", full_disk.SHORT, _start)


_start: Callable[..., Forked] = lambda command, env, log: Forked.start(command, env, log)  # type: ignore[assignment,return-value]  # noqa: E731
