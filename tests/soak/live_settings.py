"""Load that never stops while settings change five times a second.

    python -m tests.soak.live_settings --minutes 30 --clients 200
    python -m tests.soak.live_settings --minutes 5 --plain --out plain.json     # the control
    python -m tests.soak.live_settings --minutes 5 --control plain.json

Streaming clients of random lengths come and go, some leave early, some ask for what must be
refused; settings change all the while, one change in ten a wrong one. No request may be lost, mixed
up or answered with an error that it did not ask for, no wrong setting may be taken, SERE may not
fail, nothing may be left running, and resident memory may not grow. Ends with status 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.serving.experiment import ROOT
from sere_sglang.measure.server import Server, serve
from tests.soak.clients import Tally, client
from tests.soak.logs import trouble_in
from tests.soak.memory import MemoryWatch, Slope

CHANGES_PER_SECOND = 5.0
WRONG: tuple[dict[str, Any], ...] = (
    {"primary_k": 0}, {"primary_k": "2"}, {"policy": "none"}, {"threshold": 7}, {"no_such_key": 1},
)  # fmt: skip
GROWTH = 10.0
"""MiB an hour above 0, or above the control, from which on a slope's interval counts as growth."""

WARM = 20.0
"""Minutes from which on memory is judged without a control: before, SGLang's CPU engine itself
grows, as its allocator meets new shapes of batches."""


@dataclasses.dataclass
class Report:
    """What `run` saw; `failures` says in words what must not be."""

    seconds: float
    clients: int
    plain: bool
    changes: int
    refused_changes: int
    tally: Tally
    memory: list[Slope]
    failures: list[str]


def _change(draw: random.Random) -> dict[str, Any]:
    """One that the demo model's server (top-k 8, rules of the CPU engine) takes."""
    return draw.choice((
        {"enabled": draw.random() < 0.8},
        {"policy": "static", "rule": "similarity", "primary_k": draw.randint(1, 3)},
        {"policy": "adaptive", "quality_budget": draw.choice((0.0, 0.02, 0.2))},
        {"policy": "slo", "tpot_slo_ms": draw.choice((0.5, 20.0, 500.0))},
        {"threshold": draw.random(), "fast_threshold": draw.random()},
        {"rule": draw.choice(("similarity", "energy", "topk", "piggyback"))},
        {"min_batch": draw.randint(1, 8), "max_batch": draw.choice((None, 8, 64))},
        {"min_gain": draw.choice((0.0, 0.03))},
        {"reset_counters": True},
    ))  # fmt: skip


async def _change_settings(
    session: aiohttp.ClientSession, url: str, until: float, report: Report, seed: int
) -> None:
    """Does not wait for an answer before it asks for the next."""
    draw = random.Random(seed)
    asked = []
    while time.monotonic() < until:
        is_wrong = draw.random() < 0.1
        change = draw.choice(WRONG) if is_wrong else _change(draw)
        asked.append(asyncio.create_task(_ask(session, url, change, is_wrong, report)))
        await asyncio.sleep(draw.expovariate(CHANGES_PER_SECOND))
    await asyncio.gather(*asked)


async def _ask(
    session: aiohttp.ClientSession, url: str, change: dict[str, Any], is_wrong: bool, report: Report
) -> None:
    body = {"server_args": {"sere": change}}
    async with session.post(url + "/set_internal_state", json=body) as answer:
        said = await answer.text()
    fits = answer.status == 400 if is_wrong else (answer.status, said) == (200, "[true]")
    if not fits:
        report.failures.append(f"{change}: status {answer.status}, {said[:200]}")
    report.refused_changes += is_wrong
    report.changes += not is_wrong


async def _load(server: Server, seconds: float, report: Report, seed: int) -> None:
    until = time.monotonic() + seconds
    # SGLang closes a connection that is idle for five seconds: after a stall of this process, one
    # that it still holds may be gone.
    limits = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=limits, timeout=timeout) as session:
        await asyncio.gather(
            *([] if report.plain else [_change_settings(session, server.url, until, report, seed)]),
            *(client(session, server.url, n, until, report.tally, seed)
              for n in range(report.clients)),
        )  # fmt: skip


def run(
    server: Server,
    pid: int,
    seconds: float,
    clients: int,
    seed: int = 0,
    *,
    plain: bool = False,
    control: float | None = None,
) -> Report:
    """Loads a running server whose first process is `pid`. plain: it is one without SERE. control:
    how fast the memory of such a one grew at most, in MiB an hour."""
    report = Report(0.0, clients, plain, 0, 0, Tally(wishes=not plain), [], [])
    server.generate(["warm up"] * 8, 8)
    watch = MemoryWatch(pid)
    watch.start()
    start = time.monotonic()
    asyncio.run(_load(server, seconds, report, seed))
    report.seconds = time.monotonic() - start
    report.memory = watch.stop()
    report.failures += report.tally.wrong + _left_behind(server, plain)
    if not report.tally.complete or not (report.changes or plain):
        report.failures.append("nothing happened")
    if control is not None or seconds >= 60 * WARM:
        report.failures += [
            f"{s.name} grows by {s.per_hour:.0f} MiB an hour ({s.low:.0f} to {s.high:.0f})"
            for s in report.memory
            if s.low > (control or 0.0) + GROWTH
        ]
    return report


def _left_behind(server: Server, plain: bool) -> list[str]:
    """After all clients have gone."""
    if plain:
        return []
    failures = []
    server.set_sere(enabled=True)
    state = server.sere()
    if state["failed"] is not None:
        failures.append(f"SERE failed: {state['failed']}")
    for _ in range(50):
        server.generate(["is anybody there"], 1)
        batch = server.sere()["composition"]
        if (batch["running"], batch["waiting"]) == (0, 0) or batch["running"] <= 1:
            break
        time.sleep(0.2)
    else:
        failures.append(f"still running: {batch}")
    trouble = trouble_in(server.log)
    if trouble is not None:
        failures.append(f"in the log: {trouble}")
    return failures


def _growth(report: Path | None) -> float | None:
    """The highest end of an interval in a report."""
    if report is None:
        return None
    return max(slope["high"] for slope in json.loads(report.read_text())["memory"])


def show(report: Report) -> None:
    tally = report.tally
    print(
        f"{report.seconds:.0f} s, {report.clients} clients: {tally.complete} requests complete, "
        f"{tally.aborted} left early, {tally.refused} refused as they had to be, {tally.tokens} "
        f"tokens, slowest {tally.slowest_s:.1f} s; {report.changes} changes of settings, "
        f"{report.refused_changes} wrong ones refused"
    )
    for s in report.memory:
        print(
            f"memory of {s.name}: {s.first_mib:.0f} -> {s.last_mib:.0f} MiB, {s.per_hour:+.1f} MiB "
            f"an hour (95 %: {s.low:.1f} to {s.high:.1f})"
        )
    for failure in report.failures[:20]:
        print(f"FAILED: {failure}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--plain", action="store_true", help="the control: SGLang without SERE")
    parser.add_argument("--control", type=Path, help="the report of a run with --plain: memory may "
                        "grow as it does there")  # fmt: skip
    parser.add_argument("--model", type=Path, default=ROOT / "demo_model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        flags = ["--enable-metrics", "--max-total-tokens=65536"]
        if not given.plain:
            flags.append("--moe-backend=sere")
        with serve(given.model, log, *flags) as server:
            report = run(
                server, server.pid, 60 * given.minutes, given.clients, given.seed,
                plain=given.plain, control=_growth(given.control),
            )  # fmt: skip
        show(report)
        if report.failures:
            print(log.read_text(errors="replace")[-4000:])
    if given.out is not None:
        facts = {"command": " ".join(sys.orig_argv), "machine": platform.platform()}
        given.out.write_text(json.dumps(facts | dataclasses.asdict(report), indent=1) + "\n")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
