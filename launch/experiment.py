"""Two servers, plain and with SERE, that take turns at the same work."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.load import run_load
from launch.local_server import Server, serve

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Point:
    """What one measurement runs at. primary_k None: plain SGLang; S == top-k: exact routing."""

    primary_k: int | None = None
    threshold: float | None = None

    @property
    def server(self) -> str:
        return "plain" if self.primary_k is None else "sere"

    def label(self, top_k: int) -> str:
        if self.primary_k is None:
            return "plain SGLang"
        if self.primary_k >= top_k:
            return "SERE off"
        return f"S={self.primary_k}, rho={self.threshold:g}"


PLAIN = Point()


@dataclass
class Row:
    """One line of a table and of demo.json. active_*: mean distinct experts per MoE layer; kl:
    nats per token to plain SGLang, None where quality is not measured."""

    concurrency: int
    primary_k: int | None
    threshold: float | None
    active_before: float
    active_after: float
    tok_s: float
    ratio: float
    kl: float | None = None
    perplexity: float | None = None


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
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, extra in (
            ("plain", []),
            ("sere", ["--moe-backend=sere", "--sere-policy=static", f"--sere-profile={profile}"]),
        ):
            log = logs / f"{name}.log"
            servers[name] = stack.enter_context(serve(model, log, *flags, *extra, env=env))
            told(f"[green]up[/] {name} server at {servers[name].url} (log: {log})")
        yield servers


def set_point(servers: dict[str, Server], point: Point, top_k: int) -> None:
    """Bring the server of `point` to it; the plain one has nothing to set."""
    if point == PLAIN:
        return
    if point.primary_k == top_k:
        servers["sere"].set_sere(enabled=False)
    else:
        servers["sere"].set_sere(enabled=True, primary_k=point.primary_k, threshold=point.threshold)


def count_active(
    servers: dict[str, Server], point: Point, top_k: int, run: Callable[[], Any]
) -> tuple[float, float]:
    """Mean active experts per layer before and after re-routing over the decode steps of `run`."""
    server = servers["sere"]
    if point.primary_k in (None, top_k):
        # Exact routing, counted: a threshold of 1 moves nothing but exact twins.
        server.set_sere(enabled=True, primary_k=top_k - 1, threshold=1.0)
    server.set_sere(reset_counters=True)
    run()
    layers = list(server.sere()["counters"].values())
    forwards = sum(layer["forwards"] for layer in layers)
    before = sum(layer["active_before"] for layer in layers) / forwards
    return before, sum(layer["active_after"] for layer in layers) / forwards


def decode_speeds(
    servers: dict[str, Server],
    points: list[Point],
    prompts: list[str],
    *,
    top_k: int,
    rounds: int,
    tokens: int,
    advance: Callable[[], None],
) -> dict[Point, tuple[float, float, str]]:
    """Per point: median tokens per second, median ratio to the same round's plain run, a text.

    Every round measures every point once, so that a slow minute of the machine hits all.
    """
    speeds: dict[Point, list[float]] = {point: [] for point in points}
    texts: dict[Point, str] = {}
    for _ in range(rounds):
        for point in points:
            set_point(servers, point, top_k)
            result = run_load(servers[point.server].url, prompts, tokens)
            speeds[point].append(result.decode_tok_s)
            texts[point] = result.text
            advance()
    plain = speeds[PLAIN]
    return {
        point: (
            statistics.median(found),
            statistics.median(s / p for s, p in zip(found, plain, strict=True)),
            texts[point],
        )
        for point, found in speeds.items()
    }
