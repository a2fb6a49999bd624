"""What breaks around a server and the commands that take long, on purpose.

    python -m tests.soak.kill_and_resume

`calibrate`, `evaluate` and `tune` are killed at random points, ten times each, and resumed to the
same bytes; a trace goes to a full disk and to a path that cannot be written; a profile is replaced
and truncated while it is served; the scheduler is stopped and goes on, and killed. Ends with status
1 when one of them fails.
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
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil

from sere_sglang.cli.served import FORCING_FLAG
from sere_sglang.errors import USER_ERROR
from sere_sglang.measure.server import Server, serve, start_process
from sere_sglang.schedule.cost import StepModel
from tests.server.checkpoints import write_checkpoint
from tests.server.cost_files import write_cost
from tests.server.profiles import write_profile
from tests.soak.commands import Command, Start, calibrate, evaluate, tune
from tests.soak.logs import trouble_in

PROMPTS = [f"request number {i} " * (1 + i % 3) for i in range(8)]

COST = "cost.json"  # in a served model's folder


class Failure(AssertionError):
    """Something that must not be; the message says what."""


def killed_and_resumed(
    command: Command, folder: Path, kills: int, start: Start, seed: int = 0
) -> str:
    """Kill it at random points until `kills` hit it at work; it ends with the same bytes.

    Each run gets a random share of the time that a whole one takes. Returns what happened.
    """
    folder.mkdir()
    began = time.monotonic()
    _expect(command.start(folder, start).wait(300) == 0, command.said(folder)[-2000:])
    takes = time.monotonic() - began
    in_one_go = command.written(folder)
    _expect(in_one_go.keys() == set(command.results), f"it wrote {sorted(in_one_go)}")
    draw, killed, runs = random.Random(seed), 0, 0
    done = True
    while killed < kills:
        if done:
            shutil.rmtree(folder)
            folder.mkdir()
        run = command.start(folder, start)
        runs += 1
        # It may be done sooner than the whole one: part of it is done already.
        with contextlib.suppress(Exception):
            run.wait(draw.uniform(0.1, 0.7) * takes)
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            killed += 1
        done = run.wait(60) == 0
        _expect(runs < 8 * kills + 8, "it never is at work when it is killed")
        _expect_parts_of(in_one_go, command.written(folder))  # whole or not there at all
    _expect(command.start(folder, start).wait(300) == 0, command.said(folder)[-2000:])
    _expect(command.written(folder).keys() == in_one_go.keys(), "not all results are there")
    _expect_parts_of(in_one_go, command.written(folder))
    left = [file.name for file in folder.iterdir() if file.name.startswith(".")]
    left = [name for name in left if command.name == "calibrate"]
    left += [file.name for name in command.results for file in folder.glob(f"{name}.*")]
    _expect(not left, f"left behind: {left}")
    return f"{command.name}: killed {killed} times in {runs} runs, resumed to the same bytes"


def two_at_once(command: Command, folder: Path, start: Start) -> str:
    """Of two with the same output one is refused, and the other writes what it writes alone."""
    folder.mkdir()
    _expect(command.start(folder, start).wait(300) == 0, command.said(folder)[-2000:])
    alone = command.written(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    first = command.start(folder, start)
    deadline = time.monotonic() + 120
    while not any(folder.glob(".*lock")):
        _expect(time.monotonic() < deadline, f"{command.name} never held its output")
        time.sleep(0.02)
    first_log = command.log(folder).rename(folder.with_suffix(".first.log"))
    second = command.start(folder, start)
    _expect(second.wait(120) == USER_ERROR, f"both write: {command.said(folder)[-2000:]}")
    _expect("another command writes there" in command.said(folder), command.said(folder)[-2000:])
    _expect(first.wait(300) == 0, first_log.read_text(errors="replace")[-2000:])
    _expect(command.written(folder) == alone, "other bytes than alone")
    return f"{command.name} twice with one output: the second is refused, the same bytes"


def _expect_parts_of(in_one_go: dict[str, bytes], written: dict[str, bytes]) -> None:
    for name, content in written.items():
        _expect(content == in_one_go[name], f"{name} has other bytes than in one go")


def trace_cannot_be_written(folder: Path, trace: str, start: Start) -> str:
    """Serving goes on, with one warning by each rank."""
    model = served_model(folder)
    log = folder / f"trace{trace.replace('/', '_')}.log"
    with serve(model, log, *flags(model), f"--sere-trace={trace}", start=start) as server:
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


def scheduler_killed(folder: Path, start: Start) -> str:
    """The server ends, and its clients with an error; nobody waits for ever."""
    model = served_model(folder)
    with serve(model, folder / "killed.log", *flags(model), start=start) as server:
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(_tokens(server, 400))
            except (OSError, HTTPException) as error:
                answers.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.5)
        _scheduler(server).kill()
        asking.join(60)
        _expect(len(answers) == 1 and isinstance(answers[0], Exception), f"got {answers}")
        deadline = time.monotonic() + 60
        while _runs(server.pid):
            _expect(time.monotonic() < deadline, "the server did not end")
            time.sleep(0.1)
    return "scheduler killed: the server ends, its client gets an error"


def _runs(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _scheduler(server: Server) -> psutil.Process:
    """The process that SGLang calls so; where processes are forked, the one with the KV cache."""
    children = psutil.Process(server.pid).children(recursive=True)
    named = [p for p in children if "scheduler" in " ".join(p.cmdline())]
    _expect(len(named) >= 1, f"no scheduler among {[p.cmdline() for p in children]}")
    return named[0]


def flags(model: Path) -> list[str]:
    """Of a server whose decisions do not hang on how fast the machine is."""
    cost = write_cost(model, model / COST, step=StepModel())
    return ["--moe-backend=sere", "--sere-primary-k=1", f"--sere-cost={cost}", FORCING_FLAG]


def calibrated_model(folder: Path) -> Path:
    """One without a profile."""
    model = folder / "model"
    if not model.exists():
        write_checkpoint("qwen3_moe", model)
    return model


def served_model(folder: Path) -> Path:
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

        def kill(command: Command) -> None:
            inside = folder / command.name
            attempt(
                command.name,
                lambda: killed_and_resumed(command, inside, given.kills, start_process, given.seed),
            )

        calibration = calibrate(calibrated_model(folder))
        kill(calibration)
        attempt("two", lambda: two_at_once(calibration, folder / "two", start_process))
        for trace in ("/dev/full", "/proc/nowhere/trace.jsonl"):
            attempt("trace", lambda t=trace: trace_cannot_be_written(folder, t, start_process))  # type: ignore[misc]
        model = served_model(folder)
        with serve(model, folder / "server.log", *flags(model)) as server:
            profile = model / "sere_profile.safetensors"
            kill(evaluate(server))
            kill(tune(server))
            attempt("profile", lambda: profile_replaced(server, profile))
            attempt("scheduler", lambda: scheduler_stopped(server, 5.0))
        attempt("scheduler", lambda: scheduler_killed(folder, start_process))
    finally:
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
