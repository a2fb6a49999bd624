"""A disk that is full at every write of every command, one after the other.

    python -m tests.soak.full_disk

Each command writes to a small tmpfs on which first nothing is left, then a little more, until it
is enough. Before that it has to end with one or two lines that name the file and what to do, and
leave no half of a result; then it goes on from what it kept, to the same bytes as in one go. The
server that `evaluate` and `tune` measure serves on. Needs root, to mount the disk. Ends with status
1 when one of them fails.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sere_sglang.errors import PREFIX, USER_ERROR
from sere_sglang.measure.server import Server, serve, start_process
from tests.soak.commands import Command, Start, calibrate, evaluate, inspect, simulate, tune
from tests.soak.kill_and_resume import COST, Failure, calibrated_model, flags, served_model

_BLOCK = 4096
_DISK = 16 << 20
SHORT = (0, 3)
"""Blocks left, of a run that is short; the whole one takes every number up to 16, then doubles."""
WHOLE = (*range(16), *(16 * 2**n for n in range(8)))


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        return _mount(Path(folder)) and _unmount(Path(folder))


def commands(server: Server, folder: Path) -> dict[str, Command]:
    """By name. server: of `served_model(folder)`."""
    model = served_model(folder)
    profile = model / "sere_profile.safetensors"
    found = (
        calibrate(calibrated_model(folder)), evaluate(server), tune(server),
        simulate(profile, model / COST), inspect(profile),
    )  # fmt: skip
    return {command.name: command for command in found}


def filled_up(command: Command, disk: Path, left: Sequence[int], start: Start) -> str:
    """left: blocks of the disk that the command finds, run by run, fewest first. Returns what
    happened, or raises `Failure`."""
    disk.mkdir()
    if command.start(disk, start).wait(300) != 0:
        raise Failure(f"{command.name}: {command.said(disk)[-2000:]}")
    in_one_go = command.written(disk)
    shutil.rmtree(disk)
    disk.mkdir()
    refused = 0
    with _small_disk(disk):
        for blocks in (*left, None):
            with _all_but(disk, blocks):
                status = command.start(disk, start).wait(300)
            if status == 0:
                break
            refused += 1
            _expect_told(command, disk, status)
            for name, content in command.written(disk).items():
                if content != in_one_go[name]:
                    raise Failure(f"{command.name}: half of {name} is left")
        written = command.written(disk)
    if status != 0 or written != in_one_go:
        differing = [name for name in in_one_go if written.get(name) != in_one_go[name]]
        raise Failure(f"{command.name}: status {status}, other than in one go: {differing}")
    return f"{command.name}: refused {refused} times for want of space, then the same bytes"


def _expect_told(command: Command, disk: Path, status: int) -> None:
    said = command.said(disk)
    told = said[said.rfind(PREFIX) :] if PREFIX in said else ""
    fits = status == USER_ERROR and "Traceback" not in said and str(disk) in told
    reason = "No space left" in told or "with room for them" in told
    if not fits or not reason or len(told.strip().splitlines()) > 2:
        raise Failure(f"{command.name}: status {status}, said {said[-2000:]!r}")


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    if not _mount(folder):
        raise Failure("a tmpfs cannot be mounted; this needs root")
    try:
        yield
    finally:
        _unmount(folder)


def _mount(folder: Path) -> bool:
    return _call("mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder))


def _unmount(folder: Path) -> bool:
    return _call("umount", "-l", str(folder))


def _call(*command: str) -> bool:
    return shutil.which(command[0]) is not None and (
        subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


@contextlib.contextmanager
def _all_but(disk: Path, blocks: int | None) -> Iterator[None]:
    """Fill it until so many blocks are left; None leaves it as it is."""
    ballast = disk / "ballast"
    if blocks is None:
        yield
        return
    free = os.statvfs(disk).f_bavail
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - blocks) * _BLOCK)
    try:
        yield
    finally:
        ballast.unlink()


def main() -> None:
    failed = False
    folder = Path(tempfile.mkdtemp())
    model = served_model(folder)
    try:
        with serve(model, folder / "server.log", *flags(model)) as server:
            for command in commands(server, folder).values():
                try:
                    disk = folder / f"disk_{command.name}"
                    print(filled_up(command, disk, WHOLE, start_process), flush=True)
                except Failure as failure:
                    failed = True
                    print(f"FAILED: {failure}", flush=True)
    finally:
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
