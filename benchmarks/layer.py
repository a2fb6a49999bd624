"""A whole MoE layer on a GPU, plain against SERE: time, active experts, achieved bandwidth.

    python -m benchmarks.layer [--quick] [--dry-run] [--budget SECONDS] [--gemm auto|sglang|own]

Gate, softmax top-k, re-routing and grouped GEMMs of the routed experts, in bf16, at the shapes of
three models (benchmarks/moe_layer.py has them, and how tokens choose). Plain and SERE see the same
hidden states. Times are per layer, from replays of a CUDA graph that goes through several layers'
weights, after the L2 cache has been overwritten. ``gb_s`` is what SERE's time means for its active
experts' weights, beside the card's bandwidth in a large copy, ``copy_gb_s``. ``reached`` is the
speed-up over the ratio of active experts; the goal is 0.9.
Writes ``layer.json``: rows ``{"model", "batch", "primary_k", "us_plain", "us_sere",
"active_plain", "active_sere", "gb_s", ...}``. ``--dry-run``: tiny, on a CPU, means nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import layer_kernels
from benchmarks._common import write_result
from benchmarks._timing import (
    Candidate,
    GraphTimer,
    HostTimer,
    Timer,
    copy_bandwidth,
    cuda_info,
    first_line,
)
from benchmarks.moe_layer import (
    MODELS,
    TINY,
    TOPICS,
    ZIPF,
    Kernels,
    Layer,
    LayerCall,
    MoeShape,
    make_layers,
    make_tokens,
    sere_control,
)

BATCHES: tuple[int, ...] = (
    32,
    128,
    8,
    64,
    256,
    16,
)  # the most telling ones first, should time run out
PRIMARY_KS = (1, 2, 3)
LAYERS = 4  # at least 4 GB of weights per model
PLAIN = 0


def measure(
    shape: MoeShape,
    layers: Sequence[Layer],
    batch: int,
    kernels: Kernels,
    timer: Timer,
    rounds: int,
) -> list[dict[str, Any]]:
    """Rows of one model and batch, one per S."""
    device = layers[0].gate_t.device.type
    tokens = [make_tokens(shape, layer, batch, seed) for seed, layer in enumerate(layers)]
    calls: dict[int, list[LayerCall]] = {}
    for primary_k in (PLAIN, *PRIMARY_KS):
        control = None if primary_k == PLAIN else sere_control(primary_k, device)
        calls[primary_k] = [
            LayerCall(shape, layer, x, kernels, control)
            for layer, x in zip(layers, tokens, strict=True)
        ]
    active = {s: sum(call.active_experts() for call in c) / len(c) for s, c in calls.items()}
    _check(calls[2][0])
    timings = timer.measure(
        {str(s): Candidate(c * 2) for s, c in calls.items()}, rounds, warm=False
    )
    gigabytes = shape.expert_bytes(layers[0].w1.element_size()) / 1e9
    rows = []
    for primary_k in PRIMARY_KS:
        if str(PLAIN) not in timings or str(primary_k) not in timings:
            continue  # it could not be captured; the timer has noted that
        plain, sere = timings[str(PLAIN)].cold, timings[str(primary_k)].cold
        before, after = active[PLAIN], active[primary_k]
        rows.append(
            {
                "model": shape.model,
                "batch": batch,
                "primary_k": primary_k,
                "us_plain": round(plain, 2),
                "us_sere": round(sere, 2),
                "active_plain": before,
                "active_sere": after,
                "gb_s": round(after * gigabytes / sere * 1e6, 1),
                "gb_s_plain": round(before * gigabytes / plain * 1e6, 1),
                "speed_up": round(plain / sere, 3),
                "active_ratio": round(before / after, 3),
                "reached": round((plain / sere) / (before / after), 3),
                "us_spread": round(timings[str(primary_k)].spread, 2),
            }
        )
    return rows


def _check(call: LayerCall) -> None:
    """One layer's result against a loop over its experts."""
    weights, ids = call.route()
    layer = call.layer
    want = layer_kernels.fused_experts_loop(call.x, layer.w1, layer.w2, weights, ids)
    got = call.kernels.experts(call.x, layer.w1, layer.w2, weights, ids)
    error = layer_kernels.relative_error(got, want)
    if not error < layer_kernels.MAX_ERROR:
        raise AssertionError(f"wrong result: relative error {error:.3f}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three batches, fewer rounds")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument(
        "--budget", type=float, default=600.0, help="stop measuring after so many seconds"
    )
    parser.add_argument("--gemm", choices=("auto", "sglang", "own"), default="auto")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    began = time.monotonic()
    models, batches, rounds = MODELS, BATCHES, 15
    device, dtype, copy_bytes = "cuda", torch.bfloat16, 2 << 30
    if options.quick:
        batches, rounds = BATCHES[:3], 7
    if options.dry_run:
        models, batches, rounds = (TINY,), (3, 9), 3
        device, dtype, copy_bytes = "cpu", torch.float32, 1 << 22
    elif not torch.cuda.is_available():
        print("no GPU: nothing measured (--dry-run goes through it on a CPU)", file=sys.stderr)
        return 2
    timer: Timer = HostTimer() if options.dry_run else GraphTimer()
    copy_gb_s = round(copy_bandwidth(device, copy_bytes), 1)
    kernels, names, failed = layer_kernels.choose(device, options.gemm)
    print(f"copy bandwidth {copy_gb_s} GB/s; " + "; ".join(f"{k}: {v}" for k, v in names.items()))

    rows: list[dict[str, Any]] = []

    def write() -> Path:
        return write_result(
            "layer",
            sorted(rows, key=lambda r: (r["model"], r["batch"], r["primary_k"])),
            **cuda_info(),
            dry_run=options.dry_run,
            copy_gb_s=copy_gb_s,
            kernels=names,
            dtype=str(dtype).removeprefix("torch."),
            layers=LAYERS,
            rounds=rounds,
            threshold=0.0,
            zipf=ZIPF,
            topics=TOPICS,
            failed=failed + timer.errors,
        )

    made: dict[str, list[Layer]] = {}
    for batch, shape in [(batch, shape) for batch in batches for shape in models]:
        if time.monotonic() - began > options.budget:
            failed.append(f"stopped after {options.budget:.0f} s")
            break
        try:
            if shape.model not in made:
                made[shape.model] = make_layers(shape, LAYERS, device, dtype)
            rows += measure(shape, made[shape.model], batch, kernels, timer, rounds)
        except Exception as error:
            failed.append(f"{shape.model} batch {batch}: {first_line(error)}")
            continue
        write()  # what is there survives being stopped
    path = write()
    failed += timer.errors
    print_tables(rows, copy_gb_s)
    print(path)
    for reason in failed:
        print(f"FAILED {reason}", file=sys.stderr)
    return 1 if failed else 0


def print_tables(
    rows: Sequence[dict[str, Any]], copy_gb_s: float, show: Callable[[str], Any] = print
) -> None:
    show(f"one MoE layer, us; GB/s of active weights (a large copy: {copy_gb_s:.0f})")
    show("model              batch S   plain    sere  x time  active  after  x act reached   GB/s")
    for row in sorted(rows, key=lambda r: (r["model"], r["batch"], r["primary_k"])):
        show(
            f"{row['model']:18} {row['batch']:5} {row['primary_k']}"
            f"{row['us_plain']:8.1f}{row['us_sere']:8.1f}{row['speed_up']:8.2f}"
            f"{row['active_plain']:8.1f}{row['active_sere']:7.1f}{row['active_ratio']:7.2f}"
            f"{row['reached']:8.2f}{row['gb_s']:7.0f}"
        )


if __name__ == "__main__":
    sys.exit(main())
