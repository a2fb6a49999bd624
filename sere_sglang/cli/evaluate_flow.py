"""The course of ``sere-sglang evaluate``: a server, its cells, what is printed and written."""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import sere_sglang
from sere_sglang.cli.chosen_text import texts_of
from sere_sglang.cli.counted import counted
from sere_sglang.cli.evaluate_report import page, table
from sere_sglang.cli.evaluate_run import Grid, ask_questions, digest, walk_texts
from sere_sglang.cli.literal import literal, say
from sere_sglang.cli.served import Asked, Served, one_line_errors, served
from sere_sglang.errors import SereError
from sere_sglang.files import write_output
from sere_sglang.measure.cells import Cells
from sere_sglang.measure.machine import cpu_info, gpu_names
from sere_sglang.measure.questions import QuestionSet
from sere_sglang.measure.routing import Routing
from sere_sglang.profile import load_profile

if TYPE_CHECKING:
    from rich.console import Console

Rows = list[dict[str, Any]]
Measure = Callable[[Served, list[Routing], Cells, Rows, Callable[[str], None]], dict[str, Any]]
"""Fills the rows; returns what the results say of the text or the questions."""


@dataclass(frozen=True)
class Evaluation:
    """points: None for those of the usual ones that the server takes."""

    asked: Asked
    batches: list[int]
    points: list[Routing] | None
    usual: list[str]
    out: Path
    console: Console

    def of_text(self, file: Path | None, column: str, sequences: int) -> None:
        """Teacher-forced. Raises `SereError`."""

        def measure(
            server: Served, points: list[Routing], cells: Cells, rows: Rows,
            advance: Callable[[str], None],
        ) -> dict[str, Any]:  # fmt: skip
            if server.cannot_force:
                raise SereError(
                    f"{server.cannot_force}, so text cannot be walked; change that, or give --jsonl"
                )
            name, texts = texts_of(file, column, server.tokenizer(), sequences)
            about = self._about(server) | {"text": digest([t.continuation_ids for t in texts])}
            grid = Grid(points, self.batches, about, sequences=sequences)
            experts = load_profile(Path(server.about["profile"])).num_experts
            walk_texts(server, grid, texts, experts, cells, rows, advance)
            return {"text": name, "different_texts": len(texts)}

        self._run("text", 0, measure)

    def of_questions(self, questions: QuestionSet, max_tokens: int) -> None:
        """By generation. Raises `SereError`."""

        def measure(
            server: Served, points: list[Routing], cells: Cells, rows: Rows,
            advance: Callable[[str], None],
        ) -> dict[str, Any]:  # fmt: skip
            prompts = digest([question.prompt for question in questions.questions])
            about = self._about(server) | {"questions": [questions.name, prompts]}
            grid = Grid(points, self.batches, about, max_tokens=max_tokens)
            ask_questions(server, grid, questions, server.tokenizer(), cells, rows, advance)
            return {"questions": questions.name, "max_tokens": max_tokens}

        self._run("questions", 1, measure)

    def _run(self, kind: str, references: int, measure: Measure) -> None:
        cells, rows = Cells(self.out / "cells.jsonl"), Rows()
        about: dict[str, Any] = {"kind": kind, "command": self.asked.command}
        about |= {"sere_sglang": sere_sglang.__version__}
        about |= {"date": datetime.date.today().isoformat()}
        about |= {"hardware": cpu_info() | {"gpus": gpu_names()}}
        log = self.asked.log(self.out)
        stopped = False
        try:
            with one_line_errors(log), contextlib.ExitStack() as stack:
                with self.console.status(literal(f"starting the server; its log is {log}")):
                    server = stack.enter_context(served(self.asked, self.out, max(self.batches)))
                points, left_out = server.points(self.points, self.usual)
                # What a point costs does not hang on what a step takes on a busy machine.
                points = [Routing(p.name, {**(p.settings or {}), "min_gain": 0.0}) for p in points]
                about |= server.about | {"left_out": left_out}
                self._say(f"up: {server.sere.url}, {server.about['model']}")
                for name, reason in left_out.items():
                    self._say(f"without {name}: {reason}")
                total = len(self.batches) * (len(points) + references)
                advance = stack.enter_context(counted(self.console, total))
                about |= measure(server, points, cells, rows, advance)
        except KeyboardInterrupt:
            self._say("stopped; the same command goes on from here")
            stopped = True
        if rows:
            self._report({**about, "finished": not stopped, "rows": rows})
        if stopped:
            raise typer.Exit(130)

    def _about(self, server: Served) -> dict[str, Any]:
        """What a result hangs on beside point, batch size and text."""
        profile = Path(server.about["profile"])
        content = digest(load_profile(profile).metadata.__dict__) if profile.exists() else None
        names = ("model", "sglang", "server")
        return {name: server.about[name] for name in names} | {"profile": content}

    def _report(self, payload: dict[str, Any]) -> None:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(table(payload))
        for name, content in (
            ("evaluate.json", json.dumps(payload, indent=1) + "\n"),
            ("evaluate.html", page(payload)),
        ):
            write_output(self.out / name, content)
            say(console, f"wrote {self.out / name}")

    def _say(self, line: str) -> None:
        say(self.console, line)
