"""What ``sere-sglang bench`` measures, level by level, and the file that grows with it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import sere_sglang
from sere_sglang.cli.bench_table import Row
from sere_sglang.cli.served import Served
from sere_sglang.files import write_output
from sere_sglang.measure.divergence import divergence
from sere_sglang.measure.intervals import interval
from sere_sglang.measure.load import NoOverlap, run_load
from sere_sglang.measure.routing import OFF, PLAIN, Routing
from sere_sglang.measure.texts import Text, as_many
from sere_sglang.measure.turns import Speed, decode_speeds, use, walk

_TOKENS_IN_FLIGHT = 16384  # decoded by all streams of a run together, at most
_FEWEST, _MOST = 16, 512  # decode steps of a run
_FORCED_ROWS = 1024  # sequences times steps whose whole distributions are kept at once


@dataclass(frozen=True)
class Plan:
    """rounds: how often each routing is timed; seconds: a run of one routing, about; sequences:
    of text, at least, that quality is measured on."""

    concurrency: Sequence[int]
    rounds: int
    seconds: float
    sequences: int

    def turns(self, routings: int) -> int:
        """Units of progress: a timed run, or a walk through the text."""
        return len(self.concurrency) * routings * (self.rounds + 2)


@dataclass
class Quality:
    """active: experts per layer and step, before and after; rerouted: the share of decode steps
    that were, a policy may leave some exact; kl: of each sequence, ``[sequences]``, nats per token.
    None where text could not be walked."""

    active: tuple[float, float] | None
    rerouted: float | None
    kl: np.ndarray | None


@dataclass
class Level:
    """One number of streams."""

    speeds: dict[Routing, Speed] = field(default_factory=dict)
    quality: dict[Routing, Quality] = field(default_factory=dict)


@dataclass
class Bench:
    """Everything measured so far. about: goes to the file as it is."""

    about: dict[str, Any]
    path: Path
    levels: dict[int, Level] = field(default_factory=dict)
    finished: bool = False

    def rows(self) -> list[Row]:
        """Of everything that has met exact routing in a round."""
        return [
            _row(streams, routing, level)
            for streams, level in self.levels.items()
            for routing, speed in level.speeds.items()
            if speed.tok_s.keys() & level.speeds[OFF].tok_s.keys()
        ]

    def write(self) -> None:
        """What there is; a reader never meets half a file. Raises `SereError`."""
        payload = {
            "sere_sglang": sere_sglang.__version__,
            "date": datetime.date.today().isoformat(),
            **self.about,
            "finished": self.finished,
            "rows": [asdict(row) for row in self.rows()],
        }
        write_output(self.path, json.dumps(payload, indent=1) + "\n")


def measure(
    served: Served,
    routings: Sequence[Routing],
    texts: list[Text],
    plan: Plan,
    bench: Bench,
    advance: Callable[[str], None],
) -> None:
    """Fill `bench`, and write it after every run. routings: OFF among them."""
    for streams in plan.concurrency:
        level = bench.levels.setdefault(streams, Level())
        prompts = [text.prompt_ids for text in as_many(texts, streams)]

        def timed(streams: int = streams) -> None:
            bench.write()
            advance(f"speed, {streams} streams")

        decode_speeds(
            served.servers,
            routings,
            prompts,
            rounds=plan.rounds,
            tokens=_steps(served, prompts, plan.seconds),
            advance=timed,
            speeds=level.speeds,
            plain_every=1,
        )
        reference = None
        for routing in sorted(routings, key=lambda r: (r != PLAIN, r != OFF)):
            if served.cannot_force is None:
                reference = _quality(served, routing, texts, streams, plan, level, reference)
                bench.write()
            advance(f"quality, {streams} streams")
    bench.finished = True
    bench.write()


def _steps(served: Served, prompts: Sequence[list[int]], seconds: float) -> int:
    """So many that a run of exact routing takes `seconds`."""
    most = min(_MOST, max(_FEWEST, _TOKENS_IN_FLIGHT // len(prompts)))
    fewest = _FEWEST
    while True:
        try:
            tok_s = run_load(use(served.servers, OFF), prompts, fewest).decode_tok_s
        except NoOverlap:
            if fewest == most:
                raise
            fewest = min(2 * fewest, most)
        else:
            return int(np.clip(seconds * tok_s / len(prompts), fewest, most))


def _quality(
    served: Served,
    routing: Routing,
    texts: list[Text],
    streams: int,
    plan: Plan,
    level: Level,
    reference: np.ndarray | None,
) -> np.ndarray:
    """Walk the text; returns the exact distributions, those of the first routing."""
    sequences = max(streams, -(-plan.sequences // streams) * streams)
    steps = 1 + int(np.clip(_FORCED_ROWS // streams, 8, 32))
    chosen = [text.cut(steps) for text in as_many(texts, sequences)]
    walked, active = walk(served.servers, routing, chosen, streams)
    seen = walked[0]
    if reference is None:  # against itself, walked once more: what noise alone makes
        reference, seen = walked[0], walked[0 if routing == PLAIN else -1]
    found = divergence(reference, seen, [text.continuation_ids for text in chosen])
    rerouted = min(active.steps / (sequences // streams * (steps - 1)), 1.0)
    # The counters know the re-routed steps; in the others all experts were loaded.
    after = active.before - rerouted * (active.before - active.after)
    level.quality[routing] = Quality((active.before, after), rerouted, found.kl.mean(1))
    return reference


def _row(streams: int, routing: Routing, level: Level) -> Row:
    speed = level.speeds[routing]
    over_off, bounds = speed.over(level.speeds[OFF])
    quality = level.quality.get(routing) or Quality(None, None, None)
    before, after = quality.active or (None, None)
    kl = quality.kl
    return Row(
        streams=streams,
        routing=routing.name,
        rounds=len(speed.tok_s),
        tok_s=speed.median,
        tok_s_by_round=list(speed.tok_s.values()),
        tpot_p50_ms=speed.gap_ms(50),
        tpot_p99_ms=speed.gap_ms(99),
        over_off=over_off,
        over_off_interval=bounds,
        active_before=before,
        active_after=after,
        rerouted_steps=quality.rerouted,
        kl=None if kl is None else float(kl.mean()),
        kl_interval=None if kl is None else interval(kl, np.mean),
    )
