"""Two servers, plain and with SERE, that take turns at the same work."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.load import run_load
from benchmarks.serving.server import IMPORTS_CHECKOUT, Server, serve


@dataclass(frozen=True)
class Routing:
    """One way to route: its name in tables, and the live settings that make it (None: plain)."""

    name: str
    settings: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def server(self) -> str:
        return "plain" if self.settings is None else "sere"

    @property
    def reroutes(self) -> bool:
        return self.settings is not None and self.settings["enabled"]


PLAIN = Routing("plain")
OFF = Routing("off", {"enabled": False})
_ADAPTIVE = {"enabled": True, "policy": "adaptive", "min_batch": 3}
ADAPTIVE = Routing("adaptive", _ADAPTIVE | {"rule": "similarity"})
AUTO = Routing("auto", _ADAPTIVE | {"rule": "energy"})
"""The adaptive policy at its default budget, under SERE's rule and under --sere-rule auto."""


def static(primary_k: int) -> Routing:
    """The published method at this S, with rho = 0."""
    return Routing(f"S={primary_k}", static_settings(primary_k))


def static_settings(primary_k: int) -> dict[str, Any]:
    """The live settings that make a server `static`."""
    settings = {"policy": "static", "primary_k": primary_k, "threshold": 0.0, "min_batch": 1}
    return {"enabled": True, "rule": "similarity", **settings}


def counted_exactly(top_k: int) -> dict[str, Any]:
    """Exact routing that counters see: a threshold of 1 moves nothing but exact twins."""
    return static_settings(top_k - 1) | {"threshold": 1.0}


@dataclass(frozen=True)
class Speed:
    """tok_s: decode tokens per second by round; text: what the first stream wrote."""

    tok_s: dict[int, float]
    text: str

    @property
    def median(self) -> float:
        return statistics.median(self.tok_s.values())

    def over(self, other: Speed) -> tuple[float, tuple[float, float]]:
        """Median ratio over the rounds of both, and its interval (`interval`)."""
        both = self.tok_s.keys() & other.tok_s.keys()
        ratios = [self.tok_s[at] / other.tok_s[at] for at in sorted(both)]
        return statistics.median(ratios), interval(ratios)


def interval(
    samples: Sequence[float] | np.ndarray,
    of: Callable[..., np.ndarray] = np.median,
    level: float = 0.95,
) -> tuple[float, float]:
    """Confidence interval of the median, or of another statistic with an axis, by resampling."""
    draws = np.random.default_rng(0).choice(samples, (4000, len(samples)))
    tail = 50 * (1 - level)
    low, high = np.percentile(of(draws, axis=1), [tail, 100 - tail])
    return float(low), float(high)


def heldout_prompts(
    model: Path, prompt_tokens: int = 48, continuation_tokens: int = 33
) -> list[Any]:
    """Held-out prompts cut to one length, so that a batch decodes in lockstep."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    texts = []
    for line in (model / "data" / "heldout_prompts.jsonl").read_text().splitlines():
        entry = json.loads(line)
        ids = tokenizer(entry["prompt"] + entry["continuation"], add_special_tokens=False)
        ids = ids["input_ids"]
        if len(ids) < prompt_tokens + continuation_tokens:
            continue
        prompt, rest = ids[:prompt_tokens], ids[prompt_tokens:]
        texts.append(
            {
                "prompt": tokenizer.decode(prompt),
                "prompt_ids": prompt,
                "continuation_ids": rest[:continuation_tokens],
            }
        )
    if not texts:
        sys.exit(f"no held-out prompt of {prompt_tokens + continuation_tokens} tokens in {model}")
    return texts


@contextmanager
def both_servers(
    model: Path, profile: Path, logs: Path, *flags: str, told: Callable[[str], None]
) -> Iterator[dict[str, Server]]:
    """`{"plain": ..., "sere": ...}` serving `model`; logs go to `logs`/<name>.log."""
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, extra in (
            ("plain", []),
            ("sere", ["--moe-backend=sere", f"--sere-profile={profile}"]),
        ):
            log = logs / f"{name}.log"
            servers[name] = stack.enter_context(
                serve(model, log, *flags, *extra, env=IMPORTS_CHECKOUT)
            )
            told(f"[green]up[/] {name} server at {servers[name].url} (log: {log})")
        yield servers


def use(servers: dict[str, Server], routing: Routing) -> Server:
    """The server of `routing`, brought to it."""
    server = servers[routing.server]
    if routing.settings is not None:
        server.set_sere(**routing.settings)
    return server


def count_active(server: Server, routing: Routing, run: Callable[[], Any]) -> tuple[float, float]:
    """Mean active experts per layer before and after re-routing over the decode steps of `run`.

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
        return count_active(server, OFF, run)
    before = sum(layer["active_before"] for layer in layers) / forwards
    return before, sum(layer["active_after"] for layer in layers) / forwards


def decode_speeds(
    servers: dict[str, Server],
    routings: list[Routing],
    prompts: list[str],
    *,
    rounds: int,
    tokens: int,
    advance: Callable[[], None],
) -> dict[Routing, Speed]:
    """Every round measures every routing once, so that a slow minute of the machine hits all.

    One more round before them warms up. Plain SGLang, many times slower on a CPU, takes part in
    every third.
    """
    speeds: dict[Routing, Speed] = {routing: Speed({}, "") for routing in routings}
    for at in range(-1, rounds):
        for routing in routings:
            if routing != PLAIN or at % 3 == 0:
                result = run_load(use(servers, routing).url, prompts, tokens)
                if at >= 0:
                    speeds[routing].tok_s[at] = result.decode_tok_s
                speeds[routing] = Speed(speeds[routing].tok_s, result.text)
            advance()
    return speeds
