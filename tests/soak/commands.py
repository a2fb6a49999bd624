"""The commands that write files, as a user gives them: what they write, and how they go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sere_sglang.measure.server import CPU_ENGINE, Process, Server

Start = Callable[..., Process]
MODULE = [sys.executable, "-m", "sere_sglang.cli.main"]


@dataclass(frozen=True)
class Command:
    """arguments: for a folder; results: the files that it writes there; going_on: what a repeated
    command needs to go on where the one before was ended; settled: returns when nothing of the one
    before is under way any more."""

    name: str
    arguments: Callable[[Path], list[str]]
    results: tuple[str, ...]
    going_on: Callable[[Path], list[str]] = lambda folder: []
    settled: Callable[[], None] = lambda: None

    def start(self, folder: Path, start: Start) -> Process:
        """On what is in `folder`, where its temporary files go too; its log is beside it."""
        self.settled()
        command = [*MODULE, *self.arguments(folder), *self.going_on(folder)]
        env = {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder), **CPU_ENGINE}
        return start(command, env, self.log(folder))

    def log(self, folder: Path) -> Path:
        return folder.with_name(f"{folder.name}.{self.name}.log")

    def said(self, folder: Path) -> str:
        return self.log(folder).read_text(errors="replace")

    def written(self, folder: Path) -> dict[str, bytes]:
        """The results that are there."""
        files = {name: folder / name for name in self.results}
        return {name: file.read_bytes() for name, file in files.items() if file.exists()}


def calibrate(model: Path) -> Command:
    out = "profile.safetensors"

    def arguments(folder: Path) -> list[str]:
        return ["calibrate", f"--model={model}", "--layer-by-layer", "--tokens=4096", "--length=64",
                "--measure=all", "--cka-tokens=256", f"--out={folder / out}"]  # fmt: skip

    def going_on(folder: Path) -> list[str]:
        return ["--resume"] if Path(f"{folder / out}.partial").exists() else []

    return Command("calibrate", arguments, (out,), going_on)


def evaluate(server: Server) -> Command:
    def arguments(folder: Path) -> list[str]:
        return ["evaluate", f"--url={server.url}", f"--out={folder}", "--batch=2,4",
                "--points=S=1,S=2,S=3", "--sequences=8"]  # fmt: skip

    results = ("evaluate.json", "evaluate.html")
    return Command("evaluate", arguments, results, settled=lambda: _idle(server))


def tune(server: Server) -> Command:
    def arguments(folder: Path) -> list[str]:
        return ["tune", f"--url={server.url}", f"--out={folder}", "--budget-kl=0.01", "--rounds=0",
                "--batch=4", "--sequences=8",
                f"--profile-out={folder / 'tuned.safetensors'}"]  # fmt: skip

    results = ("tune.json", "tune.html", "tuned.safetensors")
    return Command("tune", arguments, results, settled=lambda: _idle(server))


def simulate(profile: Path, cost: Path) -> Command:
    def arguments(folder: Path) -> list[str]:
        return ["simulate", f"--profile={profile}", f"--cost={cost}", "--steps=200",
                f"--out={folder}"]  # fmt: skip

    return Command("simulate", arguments, ("simulate.json", "simulate.png"))


def inspect(profile: Path) -> Command:
    def arguments(folder: Path) -> list[str]:
        return ["inspect", str(profile), f"--plot={folder / 'profile.png'}"]

    return Command("inspect", arguments, ("profile.png",))


def _idle(server: Server) -> None:
    """Requests of a client that was killed would decode in the batches of the next one."""
    deadline = time.monotonic() + 60
    while any(
        load["num_running_reqs"] + load["num_waiting_reqs"]
        for load in server.get("/v1/loads")["loads"]
    ):
        assert time.monotonic() < deadline, "requests of a killed client go on"
        time.sleep(0.05)
