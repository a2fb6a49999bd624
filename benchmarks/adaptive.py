"""Policies on one real server under a load that rises and falls: who is fast, and at what price.

    python -m benchmarks.adaptive
    python -m benchmarks.adaptive --tokens 20 --columns 2048     a load with more prefill
    python -m benchmarks.adaptive --clients 16                   fewer clients at the peak
    python -m benchmarks.adaptive --tuned FILE                   also a profile that `tune` wrote

The demo model with its experts padded (serving.padded_model): its quality is real,
and its steps are bound by the bytes of its experts. Clients come and go between 1 and 48; each asks
one request after the other, so prefills, which are never re-routed, fall in between. All policies
meet the same clients, in turns. Clients and HTTP processes share the engine's cores, so streams
send eight tokens at a time, which are not parsed.
Writes ``adaptive.json`` and ``adaptive.png``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks._common import RESULTS_DIR, hardware_slug, write_result
from benchmarks.serving.experiment import IMPORTS_CHECKOUT, heldout_prompts
from benchmarks.serving.padded_model import WIDTH, write_padded_model
from sere_sglang.measure import forcing
from sere_sglang.measure.divergence import mean_kl
from sere_sglang.measure.intervals import interval
from sere_sglang.measure.load import events, tokens_so_far
from sere_sglang.measure.routing import ADAPTIVE, AUTO, static_settings
from sere_sglang.measure.server import Server, serve
from sere_sglang.measure.texts import Text
from sere_sglang.profile import load_profile
from sere_sglang.schedule.expectation import Expectation, expect, statistics_of
from sere_sglang.schedule.trace import TraceStep, read_trace

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "demo_model"
CLIENTS, TOKENS = 48, 128
QUALITY_LEVELS = (0.0, 1 / 6, 1 / 2, 1.0)  # of the clients, one at least
POLICIES: dict[str, dict[str, Any]] = {
    "off": {"enabled": False},
    "static S=1": static_settings(1),
    "static S=2": static_settings(2),
    "piggyback k0=2": static_settings(2) | {"rule": "piggyback"},
    "adaptive": ADAPTIVE.settings or {},
    "auto": (AUTO.settings or {}) | {"tuned": False},
}
TUNED = {"auto, tuned": (AUTO.settings or {}) | {"tuned": True}}


@dataclass
class Measured:
    """tok_s and gaps (milliseconds between a stream's tokens) of each round; active experts."""

    tok_s: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    active: list[float] = field(default_factory=list)
    steps: list[TraceStep] = field(default_factory=list)
    kl: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of load, per policy and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=CLIENTS, help="at the peak")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="that each request writes")
    parser.add_argument("--columns", type=int, default=WIDTH, help="of an expert")
    parser.add_argument("--tuned", type=Path, metavar="PROFILE", help="of the demo model, with "
                        "budgets by sere-sglang tune for rule auto")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "adaptive")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    model, profile = write_padded_model(
        folder / "padded_model",
        MODEL,
        arguments.tuned or MODEL / "sere_profile.safetensors",
        arguments.columns,
    )
    policies = POLICIES | (TUNED if arguments.tuned else {})
    texts = heldout_prompts(MODEL)
    trace = folder / "trace.jsonl"
    trace.unlink(missing_ok=True)
    flags = [
        "--moe-backend=sere", f"--sere-profile={profile}", f"--sere-trace={trace}",
        "--chunked-prefill-size=16384", "--stream-interval=8", forcing.SERVER_FLAG,
    ]  # fmt: skip
    expected = expect(statistics_of(load_profile(profile)))
    found = {name: Measured() for name in policies}
    with serve(model, folder / "server.log", *flags, env=IMPORTS_CHECKOUT) as server:
        for at in range(-1, arguments.rounds):  # the first one warms up
            for name, settings in policies.items():
                server.set_sere(**settings, reset_counters=True)
                first = _lines(server, trace)
                seconds = arguments.seconds if at >= 0 else 6.0
                load = _load(server.url, texts, seconds, arguments.clients, arguments.tokens)
                tok_s, gaps = asyncio.run(load)
                steps = list(read_trace(trace))[first : _lines(server, trace)]
                if at >= 0:
                    found[name].tok_s.append(tok_s)
                    found[name].gaps += gaps
                    found[name].active.append(_active(server, steps, expected))
                    found[name].steps = steps
                print(f"round {at + 1}: {name}: {tok_s:.0f} tok/s", flush=True)
        levels = [max(1, round(share * arguments.clients)) for share in QUALITY_LEVELS]
        _measure_quality(server, texts, levels, policies, found)
    rows = [_row(name, measured, found["off"]) for name, measured in found.items()]
    _print(rows)
    name = "adaptive"
    if (arguments.tokens, arguments.columns) != (TOKENS, WIDTH):
        name += f"_{arguments.tokens}_{arguments.columns}"
    if arguments.clients != CLIENTS:
        name += f"_{arguments.clients}_clients"
    prefill_share = _prefill_share(found["off"].steps)
    print(f"with off, prefills take {prefill_share:.0%} of the time")
    path = write_result(
        name,
        rows,
        model=f"demo model, experts padded to {arguments.columns} columns",
        clients=arguments.clients,
        tokens=arguments.tokens,
        prefill_share=prefill_share,
    )
    from benchmarks.serving.adaptive_plot import draw

    picture = Path(os.environ.get("OUT") or RESULTS_DIR / hardware_slug()) / f"{name}.png"
    draw({name: measured.steps for name, measured in found.items()}, rows, expected, picture)
    print(f"wrote {path} and {picture}")


async def _load(
    url: str, texts: list[Text], seconds: float, clients: int, asked_tokens: int
) -> tuple[float, list[float]]:
    """Client i is there for a stretch around the middle: few stay long, many come at the peak."""
    gaps: list[float] = []
    tokens = 0
    began = time.perf_counter()

    async def client(i: int, session: aiohttp.ClientSession) -> None:
        nonlocal tokens
        share = i / clients
        await asyncio.sleep(0.5 * seconds * share)
        end = began + seconds * (1.0 - 0.5 * share)
        turn = i
        sampling = {"temperature": 0, "max_new_tokens": asked_tokens, "ignore_eos": True}
        while time.perf_counter() < end:
            prompt = texts[turn % len(texts)].prompt_ids * (1 + 3 * (turn % 5 == 0))
            turn += 7
            body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
            had, before = 0, 0.0
            async with session.post(f"{url}/generate", json=body) as answer:
                answer.raise_for_status()
                async for event in events(answer):
                    has, now = tokens_so_far(event) or had, time.perf_counter()
                    if had:
                        gaps.extend([1000 * (now - before) / max(has - had, 1)] * (has - had))
                    had, before = has, now
            tokens += had

    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=600), connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        await asyncio.gather(*(client(i, session) for i in range(clients)))
    return tokens / (time.perf_counter() - began), gaps


def _lines(server: Server, trace: Path) -> int:
    """Steps traced so far; any change of settings writes out what the trace holds back."""
    server.set_sere(reset_counters=False)
    return len(trace.read_text().splitlines()) if trace.exists() else 0


def _prefill_share(steps: list[TraceStep]) -> float:
    """Of the time in which a step was under way."""
    took = np.diff([step.time for step in steps])
    decodes = np.array([step.composition.mode == "decode" for step in steps[:-1]])
    return float(took[~decodes].sum() / took.sum())


def _active(server: Server, steps: list[TraceStep], expected: Expectation) -> float:
    """Experts per layer and decode step: counted where re-routed, expected of exact steps."""
    counters = list(server.sere()["counters"].values())
    counted = sum(c["active_after"] for c in counters) / len(counters)
    forwards = counters[0]["forwards"]
    exact = [
        expected.plain_active(s.composition.num_tokens) / len(counters)
        for s in steps
        if s.composition.mode == "decode" and not s.point.enabled
    ]
    return (counted + sum(exact)) / max(forwards + len(exact), 1)


def _measure_quality(
    server: Server,
    texts: list[Text],
    levels: list[int],
    policies: dict[str, dict[str, Any]],
    found: dict[str, Measured],
) -> None:
    """KL to exact routing, teacher-forced, over batches of several sizes, per token."""
    reference: dict[int, np.ndarray] = {}
    for name, settings in policies.items():
        server.set_sere(**settings)
        total, weight = 0.0, 0
        for level in levels:
            batch = [texts[i % len(texts)] for i in range(level)]
            seen = forcing.forced_log_probs(
                server, [t.prompt_ids for t in batch], [t.continuation_ids for t in batch]
            )
            total += level * mean_kl(reference.setdefault(level, seen), seen)
            weight += level
        found[name].kl = total / weight


def _row(name: str, measured: Measured, off: Measured) -> dict[str, Any]:
    ratios = [ours / theirs for ours, theirs in zip(measured.tok_s, off.tok_s, strict=True)]
    return {
        "policy": name,
        "tok_s": statistics.median(measured.tok_s),
        "ratio": statistics.median(ratios),
        "ratio_interval": interval(ratios),
        "tpot_p50_ms": float(np.percentile(measured.gaps, 50)),
        "tpot_p99_ms": float(np.percentile(measured.gaps, 99)),
        "active": statistics.fmean(measured.active),
        "kl": measured.kl,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    heads = f"{'policy':12} {'tok/s':>6} {'x off':>6} {'95 %':>11}"
    print(f"\n{heads} {'p50 ms':>7} {'p99 ms':>7} {'active':>7} KL")
    for row in rows:
        print(
            f"{row['policy']:12} {row['tok_s']:6.0f} {row['ratio']:6.2f} "
            f"{'{:.2f} - {:.2f}'.format(*row['ratio_interval']):>11} {row['tpot_p50_ms']:7.1f} "
            f"{row['tpot_p99_ms']:7.1f} {row['active']:7.1f} {row['kl']:.4f}"
        )


if __name__ == "__main__":
    main()
