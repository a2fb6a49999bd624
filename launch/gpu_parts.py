"""The parts of ``launch/gpu_check.sh`` that are Python, one command each; needs torch alone."""

from __future__ import annotations

import argparse
import functools
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SMALL_SIZES = ((1, 8, 2), (33, 60, 4), (70, 128, 8), (1100, 130, 3), (9000, 16, 4))
"""T, E, K: every form of the kernels."""


def machine() -> int:
    """Say what this runs on."""
    print(f"Python {platform.python_version()}, torch {torch.__version__}", end="")
    for name in ("triton", "numpy", "pytest", "tvm_ffi", "sglang"):
        try:
            module = __import__(name)
            print(f", {name} {getattr(module, '__version__', '?')}", end="")
        except Exception as error:
            print(f", {name}: {type(error).__name__}", end="")
    print()
    for command in (
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm", "--format=csv"],
        ["nvcc", "--version"],
    ):
        if shutil.which(command[0]) is None:
            print(f"{command[0]}: not on PATH")
            continue
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        said = (done.stdout or done.stderr).strip().splitlines()
        print(f"{command[0]}: {said[-1] if said else 'says nothing'}")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_properties(torch.cuda.current_device()))
    return 0


def build(arch: str | None) -> int:
    """Compile everything that the check uses, for this GPU; or for `arch`, loading no kernel."""
    from benchmarks import op_impls, published_sequence
    from sere_sglang.ops.cuda import rules_fused
    from sere_sglang.ops.dispatch import load_impl
    from sere_sglang.ops.rules import load_rules

    if arch is not None:
        return _each({"published": lambda: published_sequence.native_module("cuda", arch)})
    return _each(
        {
            "cuda": lambda: load_impl("cuda", "cuda"),
            "fused": op_impls.load_fused,
            "triton": lambda: load_impl("triton", "cuda"),
            "rules in triton": lambda: load_rules("triton", "cuda"),
            "rules in cuda": lambda: load_rules("cuda", "cuda"),
            "rules fused": rules_fused.build,
            "published": lambda: published_sequence.native_module("cuda"),
            "cpu": lambda: load_impl("cpu", "cpu"),
        }
    )


def small_case() -> int:
    """Every implementation once on small inputs, for compute-sanitizer; the CPU's without a GPU."""
    from benchmarks.op_cases import OpCase
    from benchmarks.op_impls import load_impls
    from benchmarks.rules import RuleCase
    from sere_sglang.names import RULES
    from sere_sglang.ops.rules_call import MAX_ROWS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    impls, missing, _ = load_impls(device, ("cuda", "published", "empty", "fused"))
    for reason in missing:
        print(f"FAILED {reason}")

    def run(name: str, make_calls: Any) -> None:
        for tokens, experts, top_k in SMALL_SIZES:
            case = OpCase(tokens, experts, top_k, 1, device)
            for control in (case.control_off, case.control):
                case.restore()
                make_calls(case, control)[0]()
                if device == "cuda":
                    torch.cuda.synchronize()
            case.check(name)

    def run_rule(name: str) -> None:
        for tokens, experts, top_k in SMALL_SIZES:
            RuleCase(min(tokens, MAX_ROWS), experts, top_k, 1, device).candidate(name, "cuda")
            if device == "cuda":
                torch.cuda.synchronize()

    chosen: dict[str, Callable[[], object]] = {
        name: functools.partial(run, name, make_calls) for name, make_calls in impls.items()
    }
    chosen |= {f"rule {name}": functools.partial(run_rule, name) for name in RULES[1:]}
    return max(_each(chosen), 1 if missing else 0)


def tables(folder: Path, since: float) -> int:
    """Print the tables of the results that this run wrote; a missing one counts as failed."""
    from benchmarks import layer, op, rules

    failed = 0
    for name in ("op", "rules", "layer"):
        path = folder / f"{name}.json"
        if not path.is_file() or path.stat().st_mtime < since - 1:
            print(f"{name}.json: not written by this run")
            failed = 1
            continue
        result = json.loads(path.read_text())
        hardware = result["hardware"]
        print(
            f"\n{name}.json: {hardware.get('gpu', hardware['cpu'])}, torch {result['torch']}, "
            f"CUDA {result['cuda']}, {result['date']}, {len(result['rows'])} rows"
        )
        if result["dry_run"]:
            print("a dry run on a CPU: these figures mean nothing")
        if name == "op":
            print(f"top-k alone is {result['notes'].get('topk_only', 'a stand-in')}")
            op.print_tables(result["rows"])
        elif name == "rules":
            rules.print_tables(result["rows"])
        else:
            print("; ".join(f"{key}: {value}" for key, value in result["kernels"].items()))
            layer.print_tables(result["rows"], result["copy_gb_s"])
        if not result["rows"]:
            print(f"{name}.json: nothing was measured")
            failed = 1
        for reason in result["failed"]:
            print(f"FAILED {reason}")
    return failed


def _each(steps: dict[str, Callable[[], object]]) -> int:
    failed = 0
    for name, step in steps.items():
        started = time.monotonic()
        try:
            step()
        except Exception as error:
            failed = 1
            print(f"{name} FAILED: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("machine")
    commands.add_parser("build").add_argument("--arch")
    commands.add_parser("small-case")
    show = commands.add_parser("tables")
    show.add_argument("folder", type=Path)
    show.add_argument("--since", type=float, default=0.0)
    options = parser.parse_args()
    if options.command == "machine":
        return machine()
    if options.command == "build":
        return build(options.arch)
    if options.command == "small-case":
        return small_case()
    return tables(options.folder, options.since)


if __name__ == "__main__":
    sys.exit(main())
