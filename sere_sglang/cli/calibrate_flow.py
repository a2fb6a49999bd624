"""The course of ``sere-sglang calibrate``: progress on a terminal or in a log, Ctrl-C, the last
words."""

from __future__ import annotations

import shlex
import signal
import time
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sere_sglang.calibration import CalibrationJob, Interrupted, calibrate
from sere_sglang.cli.literal import say
from sere_sglang.profile.surrogate_report import surrogate_reports
from sere_sglang.schedule.auto_rule import choose_rule


def run(job: CalibrationJob) -> None:
    """Raises `SereError`, and `typer.Exit` at Ctrl-C."""
    console = Console(stderr=True)
    say(
        console,
        f"Calibrating {job.model}: {', '.join(job.spec.measures)}; experts' outputs take at most "
        f"{job.spec.memory / (1 << 20):.0f} MiB (--memory)",
    )
    stopping = _StopOnInterrupt(console)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("tokens {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    lines = _Lines(console)
    task = bar.add_task("starting", total=None, rate="")

    def show(done: int, total: int, what: str) -> None:
        speed = bar.tasks[0].speed
        rate = f"{speed:.0f}/s" if speed else ""
        bar.update(task, description=what, completed=done, total=total or None, rate=rate)
        if not console.is_terminal:
            lines.show(done, total, what)

    try:
        with bar, stopping:
            profile = calibrate(job, progress=show, stop=stopping.asked)
    except Interrupted:
        say(
            console,
            f"Stopped. What is done is in {job.partial}; repeat the command with --resume.",
        )
        raise typer.Exit(130) from None
    for layer in surrogate_reports(profile):
        console.print(layer.line(), soft_wrap=True, highlight=False)
    console.print(f"--sere-rule auto is {choose_rule(profile)}", soft_wrap=True, highlight=False)
    size = job.out.stat().st_size / 1024
    say(
        console,
        f"Wrote {job.out}: {len(profile.similarity)} layers, {profile.num_experts} experts, "
        f"{size:.0f} KiB. Look at it: sere-sglang inspect {shlex.quote(str(job.out))}",
    )


class _Lines:
    """Progress in a log file: a line when the work changes, and one every ten seconds."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._what = ""
        self._printed = 0.0

    def show(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if what.split(",")[0] != self._what or now - self._printed > 10:
            self._what, self._printed = what.split(",")[0], now
            tokens = f": {done}/{total} tokens" if total else ""
            self._console.print(f"{what}{tokens}", soft_wrap=True, highlight=False)


class _StopOnInterrupt:
    """The first Ctrl-C finishes the running sequence and stops; the second one kills."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._asked = False

    def asked(self) -> bool:
        return self._asked

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._interrupt)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, _signal: int, _frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._console.print("Stopping after this sequence; Ctrl-C again drops it.")
