"""The course of ``sere-sglang tune``: a server, a search per batch size, profile and report."""

from __future__ import annotations

import contextlib
import dataclasses
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
from sere_sglang.cli.evaluate_run import digest
from sere_sglang.cli.literal import literal, say
from sere_sglang.cli.served import Asked, Served, one_line_errors, served
from sere_sglang.cli.tune_report import line, page
from sere_sglang.cli.tune_search import CANDIDATES, Measured, Search
from sere_sglang.errors import SereError
from sere_sglang.files import can_write_in, cannot_write, write_output
from sere_sglang.measure.cells import Cells
from sere_sglang.measure.halving import REFINED, Target, rounds_of
from sere_sglang.measure.machine import cpu_info, gpu_names
from sere_sglang.measure.routing import OFF, Routing
from sere_sglang.measure.texts import Text, as_many
from sere_sglang.measure.turns import decode_speeds
from sere_sglang.measure.weight import Weigher
from sere_sglang.names import AUTO
from sere_sglang.profile import load_profile, save_profile
from sere_sglang.profile.file import TUNED_VERSION

if TYPE_CHECKING:
    from rich.console import Console

_TOKENS = 64  # of every stream, in the runs that are timed at the end
_TIMED = 3  # exact, default, tuned


@dataclass(frozen=True)
class Tune:
    """rule: None for the server's, ``auto`` for what that is there. profile_out: None for the
    profile that is served."""

    asked: Asked
    target: Target
    rule: str | None
    batches: list[int]
    sequences: int
    rounds: int
    profile_out: Path | None
    out: Path
    console: Console

    def run(self, file: Path | None, column: str) -> None:
        """Raises `SereError`; ends with status 130 after Ctrl-C."""
        about: dict[str, Any] = {
            "command": self.asked.command,
            "sere_sglang": sere_sglang.__version__,
            "date": datetime.date.today().isoformat(),
            "hardware": cpu_info() | {"gpus": gpu_names()},
            "target": dataclasses.asdict(self.target),
        }
        log = self.asked.log(self.out)
        try:
            with one_line_errors(log), contextlib.ExitStack() as stack:
                with self.console.status(literal(f"starting the server; its log is {log}")):
                    server = stack.enter_context(served(self.asked, self.out, max(self.batches)))
                if server.cannot_force:
                    raise SereError(f"{server.cannot_force}, so text cannot be walked; change that")
                self._say(f"up: {server.sere.url}, {server.about['model']}")
                rule, server = self._rule(server)
                profile = Path(server.about["profile"])
                _require_writable(self.profile_out or profile)
                name, texts = texts_of(file, column, server.tokenizer(), self.sequences)
                about |= {**server.about, "rule": rule, "text": name}
                measured = self._measured(server, texts)
                advance = stack.enter_context(counted(self.console, self._turns))
                found = [
                    self._at(server, rule, batch, texts, measured, advance)
                    for batch in self.batches
                ]
        except KeyboardInterrupt:
            self._say("stopped; the same command goes on from here")
            raise typer.Exit(130) from None
        self._write(profile, rule, found, about)
        self._report({**about, "batches": found})

    @property
    def _turns(self) -> int:
        cells = sum(count for count, _ in rounds_of(len(CANDIDATES), self.sequences)) + REFINED
        timed = (self.rounds + 1) * _TIMED if self.rounds else 0
        return len(self.batches) * (cells + 1 + timed)

    def _rule(self, server: Served) -> tuple[str, Served]:
        """By its name, and `server` as it is tuned. Raises `SereError` for a rule that it does not
        have."""
        rule: str = self.rule or server.state["rule"]
        if rule == AUTO:
            chosen = server.auto_rule.settings
            rule, server = chosen["rule"], dataclasses.replace(server, base=server.base | chosen)
        reason = server.state["unavailable_rules"].get(rule)
        if reason is not None:
            raise SereError(f"--rule {rule}: {reason}; choose another, or start the server with it")
        return rule, server

    def _measured(self, server: Served, texts: list[Text]) -> Measured:
        """Once for all batch sizes."""
        profile = load_profile(server.about["profile"])
        about = {key: server.about[key] for key in ("model", "sglang", "server")}
        about["text"] = digest([one.continuation_ids for one in texts])
        # What a budget does hangs on the profile, not on what it was tuned to before.
        about["profile"] = digest(_untuned(profile.metadata))
        weigher = Weigher(server.sere, profile.num_experts)
        return Measured(weigher, Cells(self.out / "cells.jsonl"), about)

    def _at(
        self, server: Served, rule: str, batch: int, texts: list[Text], measured: Measured,
        advance: Callable[[str], None],
    ) -> dict[str, Any]:  # fmt: skip
        """One batch size: every cell, the chosen one, and the server's default budget beside it."""
        search = Search(server, rule, batch, self.target, texts, measured, advance)
        search.run(self.sequences)
        default = search.cell(server.base["quality_budget"], self.sequences)
        chosen = search.chosen
        result: dict[str, Any] = {
            "batch": batch, "rows": search.rows, "default": default, "chosen": chosen,
            "holds": chosen is not None and self.target.holds(search.trial(chosen)),
        }  # fmt: skip
        if self.rounds:
            points = {"exact": OFF, "default": search.point(default["budget"])}
            points["tuned"] = OFF if chosen is None else search.point(chosen["budget"])
            self._time(server, result, points, texts, advance)
        return result

    def _time(
        self, server: Served, result: dict[str, Any], points: dict[str, Routing],
        texts: list[Text], advance: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Decode speed over exact routing's, with its interval, in interleaved rounds."""
        routings = {name: Routing(name, point.settings) for name, point in points.items()}
        speeds = decode_speeds(
            server.servers,
            list(routings.values()),
            [text.prompt_ids for text in as_many(texts, result["batch"])],
            rounds=self.rounds,
            tokens=_TOKENS,
            advance=lambda: advance(f"batch {result['batch']}, speed"),
        )
        for name in ("default", "tuned"):
            over, bounds = speeds[routings[name]].over(speeds[routings["exact"]])
            result[f"{name}_over_exact"] = [over, *bounds]

    def _write(
        self, served_profile: Path, rule: str, found: list[dict[str, Any]], about: dict[str, Any]
    ) -> None:
        """Into the profile: what a batch size without an acceptable budget may spend is nothing."""
        profile = load_profile(served_profile)
        rows = []
        for each in found:
            chosen = each["chosen"] if each["holds"] else None
            told = {name: (chosen or {}).get(name) for name in ("kl", "speedup", "sequences")}
            rows.append(
                {"batch": each["batch"], "budget": chosen["budget"] if chosen else 0.0, **told}
            )
        kept = {name: about[name] for name in ("target", "text", "date", "sere_sglang")}
        rules = dict(profile.metadata.tuning.get("rules", {}))
        rules[rule] = {"rows": rows, "about": kept}
        metadata = dataclasses.replace(
            profile.metadata,
            tuning={"rules": rules},
            format_version=max(profile.metadata.format_version, TUNED_VERSION),
        )
        target = self.profile_out or served_profile
        try:
            save_profile(dataclasses.replace(profile, metadata=metadata), target)
        except OSError as error:
            raise cannot_write(target, error, "--profile-out") from None
        about["tuned_profile"] = str(target)

    def _report(self, payload: dict[str, Any]) -> None:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 120)
        for each in payload["batches"]:
            console.print(line(each), highlight=False, soft_wrap=True)
        for path, content in (
            (self.out / "tune.json", json.dumps(payload, indent=1) + "\n"),
            (self.out / "tune.html", page(payload)),
        ):
            write_output(path, content)
            say(console, f"wrote {path}")
        say(console, f"wrote the table into {payload['tuned_profile']}")

    def _say(self, text: str) -> None:
        say(self.console, text)


def _untuned(metadata: Any) -> dict[str, Any]:
    ignored = ("tuning", "format_version")
    return {name: value for name, value in vars(metadata).items() if name not in ignored}


def _require_writable(path: Path) -> None:
    """Raise `SereError` before hours are spent on what cannot be kept."""
    if not can_write_in(path.parent):
        raise SereError(f"{path}: its folder cannot be written to; name a file by --profile-out")
