"""What breaks around a server and a calibration, on purpose.

    python -m tests.soak.kill_and_resume

`calibrate` is killed at random points, ten times, and resumed to the same bytes; a trace goes to a
full disk and to a path that cannot be written; a profile is replaced and truncated while it is
served; the scheduler is stopped and goes on. Ends with status 1 when one of them fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from sere_sglang.measure.server import CPU_ENGINE, Process, Server, serve, start_process
from tests.server.checkpoints import write_checkpoint
from tests.server.profiles import write_profile
from tests.soak.logs import trouble_in

Start = Callable[..., Process]
SERE = ("--moe-backend=sere", "--sere-primary-k=1")
PROMPTS = [f"request number {i} " * (1 + i % 3) for i in range(8)]


class Failure(AssertionError):
    """Something that must not be; the message says what."""


def calibrate_killed(folder: Path, kills: int, start: Start, seed: int = 0) -> str:
    """Kill ``calibrate`` at random points until `kills` hit it at work; the bytes are the same.

    Each run gets a random share of the time that a whole one takes. Returns what happened.
    """
    write_checkpoint("qwen3_moe", folder / "model")
    whole, torn = folder / "whole.safetensors", folder / "torn.safetensors"
    takes = 0.0
    for _ in range(2):  # the first also compiles and fills caches
        began = time.monotonic()
        _expect(_calibration(folder, whole, start).wait(300) == 0, _log(folder, whole))
        takes = time.monotonic() - began
        bytes_in_one_go = whole.read_bytes()
        whole.unlink()
    draw, killed, runs = random.Random(seed), 0, 0
    partial = Path(f"{torn}.partial")
    while killed < kills:
        resume = partial.exists()
        run = _calibration(folder, torn, start, *(["--resume"] if resume else []))
        runs += 1
        # It may be done sooner than the whole one: part of it is done already.
        with contextlib.suppress(Exception):
            run.wait(draw.uniform(0.1, 0.7) * takes)
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            killed += 1
        run.wait(60)
        _expect(runs < 8 * kills + 8, "it never is at work when it is killed")
        if torn.exists():  # whole or not there at all
            _expect(torn.read_bytes() == bytes_in_one_go, "other bytes than in one go")
            torn.unlink()
    left = ["--resume"] if partial.exists() else []
    _expect(_calibration(folder, torn, start, *left).wait(300) == 0, _log(folder, torn))
    _expect(torn.read_bytes() == bytes_in_one_go, "other bytes than in one go")
    left_over = [x.name for x in folder.glob("torn.safetensors.*") if not x.name.endswith("log")]
    _expect(not left_over, f"left behind: {left_over}")
    return f"calibrate: killed {killed} times in {runs} runs, resumed to the same bytes"


def _calibration(folder: Path, out: Path, start: Start, *extra: str) -> Process:
    command = [sys.executable, "-m", "sere_sglang.cli.main", "calibrate",
               f"--model={folder / 'model'}", "--layer-by-layer", "--tokens=4096", "--length=64",
               "--measure=all", "--cka-tokens=256", f"--out={out}", *extra]  # fmt: skip
    return start(command, {"OMP_NUM_THREADS": "1", **CPU_ENGINE}, Path(f"{out}.log"))


def _log(folder: Path, out: Path) -> str:
    return Path(f"{out}.log").read_text(errors="replace")[-2000:]


def trace_cannot_be_written(folder: Path, trace: str, start: Start) -> str:
    """Serving goes on, with one warning by each rank."""
    model = _model(folder)
    log = folder / f"trace{trace.replace('/', '_')}.log"
    with serve(model, log, *SERE, f"--sere-trace={trace}", start=start) as server:
        first = _tokens(server)
        for _ in range(14):  # more forwards than a trace holds back
            _tokens(server)
        server.set_sere(reset_counters=True)
        _expect(_tokens(server) == first, "other answers")
        _healthy(server)
    told = log.read_text(errors="replace").count("serving goes on")
    _expect(told == 1, f"{told} warnings about {trace}")
    return f"trace to {trace}: serving goes on, one warning"


def profile_replaced(server: Server, profile: Path) -> str:
    """What is in memory serves on; whatever becomes of the file."""
    before, kept = _tokens(server), profile.read_bytes()
    try:
        other = profile.with_suffix(".new")
        other.write_bytes(b"garbage" * 1000)
        os.replace(other, profile)
        _expect(_tokens(server) == before, "other answers after it was replaced")
        with profile.open("r+b") as file:
            file.truncate(100)
        server.set_sere(primary_k=2)
        server.set_sere(primary_k=1)
        _expect(_tokens(server) == before, "other answers after it was truncated")
        profile.unlink()
        _expect(_tokens(server) == before, "other answers after it was deleted")
    finally:
        profile.write_bytes(kept)
    _healthy(server)
    return "profile replaced, truncated and deleted: the same answers"


def scheduler_stopped(server: Server, seconds: float) -> str:
    """SIGSTOP in the middle of requests, then SIGCONT: all of them end, as without it."""
    before = _tokens(server, 48)
    scheduler = _scheduler(server)
    answers: list[list[list[int]]] = []
    asking = threading.Thread(target=lambda: answers.append(_tokens(server, 48)))
    asking.start()
    time.sleep(0.05)
    scheduler.suspend()
    try:
        time.sleep(seconds)
        _expect(scheduler.status() == psutil.STATUS_STOPPED, "it was not stopped")
    finally:
        scheduler.resume()
    asking.join(120)
    _expect(answers == [before], "answers were lost or are others")
    _healthy(server)
    return f"scheduler stopped for {seconds:g} s: requests end as without it"


def _scheduler(server: Server) -> psutil.Process:
    """The process that SGLang calls so; where processes are forked, the one with the KV cache."""
    children = psutil.Process(server.pid).children(recursive=True)
    named = [p for p in children if "scheduler" in " ".join(p.cmdline())]
    _expect(len(named) >= 1, f"no scheduler among {[p.cmdline() for p in children]}")
    return named[0]


def _model(folder: Path) -> Path:
    model = folder / "served"
    if not model.exists():
        write_checkpoint("qwen3_moe", model)
        write_profile(model)
    return model


def _tokens(server: Server, count: int = 8) -> list[list[int]]:
    """Of every second request, which asks for exact; what the others get depends on which of them
    happen to be in a batch."""
    sampling = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
    each = [sampling | {"custom_params": {"sere": q}} for q in ("exact", "balanced")]
    body = {"text": PROMPTS, "sampling_params": [each[i % 2] for i in range(len(PROMPTS))]}
    answers = [answer["output_ids"] for answer in server.post("/generate", body)]
    _expect(all(len(answer) == count for answer in answers), "an answer is not whole")
    return answers[::2]


def _healthy(server: Server) -> None:
    state = server.sere()
    _expect(state["failed"] is None and state["enabled"], f"failed: {state['failed']}")
    trouble = trouble_in(server.log)
    _expect(trouble is None, str(trouble))


def _expect(fits: Any, message: str) -> None:
    if not fits:
        raise Failure(message)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    failed = False
    folder = Path(tempfile.mkdtemp())

    def attempt(name: str, part: Callable[[], str]) -> None:
        nonlocal failed
        try:
            print(part(), flush=True)
        except Failure as failure:
            failed = True
            print(f"FAILED: {name}: {failure}", flush=True)

    try:
        attempt(
            "calibrate", lambda: calibrate_killed(folder, given.kills, start_process, given.seed)
        )
        for trace in ("/dev/full", "/proc/nowhere/trace.jsonl"):
            attempt("trace", lambda t=trace: trace_cannot_be_written(folder, t, start_process))  # type: ignore[misc]
        model = _model(folder)
        with serve(model, folder / "server.log", *SERE) as server:
            profile = model / "sere_profile.safetensors"
            attempt("profile", lambda: profile_replaced(server, profile))
            attempt("scheduler", lambda: scheduler_stopped(server, 5.0))
    finally:
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
