"""Compiles the Triton kernels for GPUs that need not be here, and says what they take.

    python -m launch.triton_check [--arch sm_80 sm_90 sm_100] [--quick]

The interpreter, in which they are tested, takes what Triton's compiler refuses. Fails on an error
of the compiler, and where a kernel spills registers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from sere_sglang.ops.triton import kernels, rule_kernels, rules, surrogates
from sere_sglang.ops.triton import reroute as rerouting

ARCHS = ("sm_80", "sm_90", "sm_100")
SIZES = ((8, 8, 128), (32, 8, 128), (256, 8, 128), (64, 10, 512), (8192, 8, 128))
"""T, K, E"""
RANKS, HIDDEN = (8, 128), 2048

_TYPES = {
    "similarity": "*fp32", "scale": "*fp32", "control": "*i32", "scratch": "*i32",
    "ids": "*i32", "weights": "*fp32", "scores": "*fp32", "block": "*i32", "row_class": "*u8",
    "expert_loss": "*fp32",
    "counters": "*i64", "active": "*u8", "lost": "*fp32", "lost_experts": "*i32", "flags": "*i32",
    "sums": "*i64", "num_rows": "i32", "id_stride": "i32", "weight_stride": "i32",
    "hidden": "*bf16", "expert": "*i32", "inward": "*bf16", "inner": "*fp32", "share": "fp32",
    "row_stride": "i32", "output": "*bf16", "outward": "*bf16", "bias": "*bf16",
}  # fmt: skip


class Compiled(NamedTuple):
    registers: int
    shared: int  # bytes
    spilled: int  # bytes


def kernels_of(num_rows: int, top_k: int, experts: int) -> Iterator[tuple[Any, dict[str, int]]]:
    """What a layer of that size launches, with its compile-time arguments."""
    yield from kernels_of_rerouting(num_rows, top_k, experts)
    yield from kernels_of_rules(num_rows, top_k, experts)


def kernels_of_rerouting(
    num_rows: int, top_k: int, experts: int
) -> Iterator[tuple[Any, dict[str, int]]]:
    """Of ``similarity``, with all that it may do."""
    plan = rerouting.plan_reroute(num_rows, top_k, experts)
    sizes = {
        **plan.sizes, **plan.rows, "EXPERT_TILE": plan.expert_tile, "DISTINCT": 1,
        "num_warps": plan.warps,
    }  # fmt: skip
    names = ["reroute_decode"]
    if not plan.one_program:
        names = [f"{phase}_many" for phase in ("vote", "match", "mark", "apply", "finish")]
    for name in names:
        yield getattr(kernels, name), sizes


def kernels_of_rules(
    num_rows: int, top_k: int, experts: int
) -> Iterator[tuple[Any, dict[str, int]]]:
    """Of the other rules; ``active`` as servers have it, None."""
    plan = rules.plan_rule(num_rows, top_k, experts)
    sizes = {
        **plan.experts, **plan.slots, "TILE": plan.tile, "WIDE_TILE": plan.wide_tile,
        "EXPERT_TILE": plan.expert_tile, "num_warps": plan.warps,
    }  # fmt: skip
    names = ["rule_decode"]
    if not plan.one_program:
        names = [f"rule_{phase}_many" for phase in ("vote", "add_scores", "choose", "fill")]
        names.append("rule_finish_many")
    for name in names:
        yield getattr(rule_kernels, name), sizes


def surrogate_kernels(top_k: int) -> Iterator[tuple[Any, dict[str, int]]]:
    slots = {"K": top_k, "K_PAD": triton.next_power_of_2(top_k), "num_warps": 4}
    for rank in RANKS:
        sizes = {**slots, "H": HIDDEN, "R": rank, "R_PAD": triton.next_power_of_2(rank)}
        for kernel, columns in (
            (surrogates.inward_slots, surrogates.INWARD_TILE),
            (surrogates.outward_slots, surrogates.OUTWARD_TILE),
        ):
            yield kernel, {**sizes, "TILE": surrogates.tile_of(columns, HIDDEN, rank)}


def compile_for(kernel: Any, sizes: dict[str, int], arch: str) -> Compiled:
    """Raises what Triton's compiler does."""
    number = int(arch.removeprefix("sm_").rstrip("af"))
    values: dict[str, Any] = {"active": None, **sizes}
    constants = {name: values[name] for name in kernel.arg_names if name in values}
    types = {n: "constexpr" if n in constants else _TYPES[n] for n in kernel.arg_names}
    compiled: Any = triton.compile(
        ASTSource(kernel, types, constants),
        target=GPUTarget("cuda", number, 32),
        options={"num_warps": sizes["num_warps"], "enable_fp_fusion": False},
    )
    return _resources(compiled.asm["ptx"], compiled.metadata.shared, number)


def _resources(ptx: str, shared: int, arch: int) -> Compiled:
    """By the assembler that Triton brings along."""
    ptxas: Any = nvidia.get_ptxas(arch)
    target = re.search(r"^\.target (\w+)", ptx, re.M)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [ptxas.path, "-v", f"-arch={target[1]}", str(source), "-o", f"{source}.cubin"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    assert registers is not None
    return Compiled(int(registers[1]), shared, sum(map(int, spills)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS, metavar="sm_90")
    parser.add_argument("--quick", action="store_true", help="two sizes")
    options = parser.parse_args(argv)
    failed = 0
    print(f"Triton {triton.__version__}")
    print("arch     T     K  E    kernel                 registers shared bytes spilled bytes")
    for arch in options.arch:
        todo = [
            (size, kernel, sizes)
            for size in (SIZES[:1] + SIZES[3:4] if options.quick else SIZES)
            for kernel, sizes in kernels_of(*size)
        ]
        todo += [((1, 8, 128), *one) for one in surrogate_kernels(8)]
        for (num_rows, top_k, experts), kernel, sizes in todo:
            where = f"{arch:8} {num_rows:<5} {top_k:<2} {experts:<4} {kernel.__name__:22}"
            try:
                found = compile_for(kernel, sizes, arch)
            except Exception as error:
                failed = 1
                print(f"{where} FAILED: {str(error).strip().splitlines()[-1]}", flush=True)
                continue
            failed |= found.spilled > 0
            print(f"{where} {found.registers:9} {found.shared:12} {found.spilled:13}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
