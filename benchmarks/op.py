"""Re-routing on a GPU: ours against the published operation sequence and an empty kernel.

    python -m benchmarks.op [--quick] [--dry-run] [--budget SECONDS]

Each figure is a time per call, from replays of a CUDA graph of 32 calls that each have inputs and a
similarity matrix of their own, as the layers of a model have. ``us``: only the layer's ids,
weights or logits are in the L2 cache, as when the kernel ahead has just written them. ``us_warm``:
everything still is. ``us_off``: as ``us``, with SERE disabled in the control block.
Writes ``op.json``: rows ``{"impl", "T", "E", "K", "us", ...}``. ``--dry-run`` goes the same way on
a CPU, with tiny sizes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import write_result
from benchmarks._timing import (
    Candidate,
    GraphTimer,
    HostTimer,
    Timer,
    Timing,
    cuda_info,
    first_line,
)
from benchmarks.op_cases import PRIMARY_K, THRESHOLD, OpCase
from benchmarks.op_impls import load_impls

TOKENS: tuple[int, ...] = (1, 8, 16, 32, 64, 128, 256, 1024)
SHAPES: tuple[tuple[int, int], ...] = ((128, 8), (60, 4), (64, 6), (256, 8), (512, 10))  # (E, K)
CALLS = 32
OFF = "_off"


def measure(
    case: OpCase, impls: dict[str, Any], timer: Timer, rounds: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of one size, and the names of implementations that were wrong or broke."""
    candidates: dict[str, Candidate] = {}
    broken = []
    for name, make_calls in impls.items():
        try:
            calls = make_calls(case, case.control)
            case.restore()
            calls[0]()
            case.check(name)
            candidates[name] = Candidate(calls, case.restore)
            if name in ("cuda", "fused"):
                candidates[name + OFF] = Candidate(make_calls(case, case.control_off), case.restore)
        except Exception as error:  # one that breaks must not take the others along
            broken.append(name)
            print(f"FAILED {name} at {case}: {first_line(error)}", file=sys.stderr, flush=True)
    timings = timer.measure(candidates, rounds)
    if "topk_only" not in impls and "fused" in impls and "fused" + OFF in timings:
        timings["topk_only"] = timings["fused" + OFF]
    rows = [_row(name, case, timings) for name in timings if not name.endswith(OFF)]
    return rows, broken


def _row(name: str, case: OpCase, timings: dict[str, Timing]) -> dict[str, Any]:
    timing = timings[name]
    row = {
        "impl": name,
        "T": case.tokens,
        "E": case.experts,
        "K": case.top_k,
        "us": round(timing.cold, 3),
        "us_warm": round(timing.warm, 3),
        "us_spread": round(timing.spread, 3),
    }
    if name + OFF in timings:
        row["us_off"] = round(timings[name + OFF].cold, 3)
    return row


def arguments(argv: Sequence[str] | None, doc: str | None = __doc__) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, four sizes")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument(
        "--budget", type=float, default=600.0, help="stop measuring after so many seconds"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    began = time.monotonic()
    tokens, shapes, rounds = TOKENS, SHAPES, 21
    if options.quick:
        tokens, shapes, rounds = (1, 32, 256, 1024), SHAPES[:2], 11
    if options.dry_run:
        tokens, shapes, rounds = (1, 5), ((16, 4), (8, 3)), 3
    elif not torch.cuda.is_available():
        print("no GPU: nothing measured (--dry-run goes through it on a CPU)", file=sys.stderr)
        return 2
    device = "cpu" if options.dry_run else "cuda"
    timer: Timer = HostTimer() if options.dry_run else GraphTimer()
    impls, missing, notes = load_impls(device)
    for reason in missing:
        print(f"MISSING {reason}", file=sys.stderr, flush=True)

    rows: list[dict[str, Any]] = []
    failed = [str(reason) for reason in missing]

    def write() -> Path:
        return write_result(
            "op",
            rows,
            **cuda_info(),
            dry_run=options.dry_run,
            calls_per_graph=CALLS,
            rounds=rounds,
            primary_k=PRIMARY_K,
            threshold=THRESHOLD,
            notes=notes,
            failed=failed + timer.errors,
        )

    sizes = [(num_tokens, *shape) for shape in shapes for num_tokens in tokens]
    for num_tokens, experts, top_k in sizes:
        if time.monotonic() - began > options.budget:
            failed.append(f"stopped after {options.budget:.0f} s")
            break
        try:
            case = OpCase(num_tokens, experts, top_k, 4 if options.dry_run else CALLS, device)
            new_rows, broken = measure(case, impls, timer, rounds)
        except Exception as error:
            failed.append(f"T={num_tokens} E={experts} K={top_k}: {first_line(error)}")
            continue
        rows += new_rows
        failed += [f"{name} at {case}" for name in broken]
        write()  # what is there survives being stopped
    path = write()
    failed += timer.errors
    print_tables(rows, print)
    print(path)
    for failure in failed:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failed else 0


def print_tables(rows: Sequence[dict[str, Any]], show: Callable[[str], Any] = print) -> None:
    """A line per size: every implementation, and the ratios that the goals are about."""
    names = ("empty", "cuda", "repeated", "fused", "topk_only", "triton", "published")
    sizes: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in rows:
        size = (row["E"], row["K"], row["T"])
        sizes.setdefault(size, {})[row["impl"]] = row["us"]
    show("us per call, table not in L2; x = published / cuda; + = fused - top-k alone")
    show("   E  K    T " + "".join(f"{name:>10}" for name in names) + "       x      +")
    for (experts, top_k, num_tokens), us in sizes.items():
        cells = "".join(f"{us[name]:10.2f}" if name in us else f"{'-':>10}" for name in names)
        ratio = f"{us['published'] / us['cuda']:8.1f}" if {"published", "cuda"} <= us.keys() else ""
        added = ""
        if {"fused", "topk_only"} <= us.keys():
            added = f"{us['fused'] - us['topk_only']:7.2f}"
        show(f"{experts:4} {top_k:2} {num_tokens:4} {cells}{ratio:>8}{added:>7}")


if __name__ == "__main__":
    sys.exit(main())
