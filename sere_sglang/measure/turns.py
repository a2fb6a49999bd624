"""Routings that take turns at the same work, so that a slow minute of the machine hits all."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sere_sglang.measure.forcing import forced_in_batches
from sere_sglang.measure.intervals import interval
from sere_sglang.measure.load import LoadResult, NoOverlap, run_load
from sere_sglang.measure.routing import OFF, PLAIN, Routing, counted_exactly
from sere_sglang.measure.server import Server
from sere_sglang.measure.texts import Text

_TRIES = 4
_LEAST_ROUNDS = 4  # with fewer an interval says little


@dataclass
class Speed:
    """tok_s: decode tokens per second by round; gaps_ms: `LoadResult.gaps_ms` of all rounds;
    text: what the first stream wrote."""

    tok_s: dict[int, float] = field(default_factory=dict)
    gaps_ms: list[float] = field(default_factory=list, repr=False)
    text: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.tok_s.values())

    def over(self, other: Speed) -> tuple[float, tuple[float, float]]:
        """Median ratio over the rounds of both, and its interval (`interval`)."""
        both = self.tok_s.keys() & other.tok_s.keys()
        ratios = [self.tok_s[at] / other.tok_s[at] for at in sorted(both)]
        return statistics.median(ratios), interval(ratios)

    def gap_ms(self, percent: float) -> float:
        """A percentile of the time per output token."""
        return float(np.percentile(self.gaps_ms, percent))


def use(servers: Mapping[str, Server], routing: Routing) -> Server:
    """The server of `routing`, brought to it."""
    server = servers[routing.server]
    if routing.settings is not None:
        server.set_sere(**routing.settings)
    return server


def decode_speeds(
    servers: Mapping[str, Server],
    routings: Sequence[Routing],
    prompts: Sequence[list[int]],
    *,
    rounds: int,
    tokens: int,
    advance: Callable[[], None],
    speeds: dict[Routing, Speed] | None = None,
    plain_every: int = 3,
    seconds: float = math.inf,
) -> dict[Routing, Speed]:
    """Every round measures every routing once.

    One more round before them warms up. Plain SGLang, many times slower on a CPU, takes part in
    one of `plain_every`. speeds: filled as the rounds go, and returned. seconds: after so many no
    round begins, but for the first `_LEAST_ROUNDS`.
    """
    speeds = {} if speeds is None else speeds
    speeds |= {routing: Speed() for routing in routings}
    deadline = time.monotonic() + seconds
    for at in range(-1, rounds):
        if at >= _LEAST_ROUNDS and time.monotonic() > deadline:
            for _ in routings:
                advance()
            continue
        for routing in routings:
            if routing != PLAIN or at % plain_every == 0:
                result = _overlapping(use(servers, routing), prompts, tokens)
                if at >= 0:
                    speeds[routing].tok_s[at] = result.decode_tok_s
                    speeds[routing].gaps_ms += result.gaps_ms
                speeds[routing].text = result.text
            advance()
    return speeds


def _overlapping(server: Server, prompts: Sequence[list[int]], tokens: int) -> LoadResult:
    """A busy machine may hold back a stream for as long as the others take."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(NoOverlap):
            return run_load(server, prompts, tokens)
    return run_load(server, prompts, tokens)


class Active(NamedTuple):
    """Mean active experts per layer and step, before and after re-routing; in how many steps."""

    before: float
    after: float
    steps: int


def count_active(server: Server, routing: Routing, run: Callable[[], Any]) -> Active:
    """Over the re-routed decode steps of `run`; of a routing that re-routes none, over all.

    Steps that a policy leaves exact are not counted, so they are left out of the mean: every
    step of one batch size gets the same decision, but for the few before the first feedback.
    """
    if not routing.reroutes:
        server.set_sere(**counted_exactly(server.sere()["top_k"]))
    server.set_sere(reset_counters=True)
    run()
    layers = list(server.sere()["counters"].values())
    forwards = sum(layer["forwards"] for layer in layers)
    if not forwards:  # the policy left every step exact
        return count_active(server, OFF, run)._replace(steps=0)
    return Active(
        before=sum(layer["active_before"] for layer in layers) / forwards,
        after=sum(layer["active_after"] for layer in layers) / forwards,
        steps=max(layer["forwards"] for layer in layers) if routing.reroutes else 0,
    )


def walk(
    servers: Mapping[str, Server], routing: Routing, texts: Sequence[Text], batch: int
) -> tuple[list[np.ndarray], Active]:
    """Log-probabilities along `texts` in batches of one size, and `count_active` on the way.

    Exact routing is walked twice, first as it is, then as counters see it.
    """
    kept: list[np.ndarray] = []
    server = use(servers, routing)

    def step() -> None:
        kept.append(forced_in_batches(server, texts, batch))

    if not routing.reroutes:
        step()
    server = servers["sere"]
    active = count_active(server, routing, step)
    return kept, active
