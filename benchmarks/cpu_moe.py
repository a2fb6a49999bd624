"""The CPU MoE runner against SGLang's ``moe_forward_native``, its time by active experts, and its
share of what the machine could do at most, for every instruction set that runs here.

    python -m benchmarks.cpu_moe [--quick] [--table floor] [--isa avx2 avx512] [--mb 1 3 16]

The routing has no expert twice in a row, as the native path breaks on those. Writes
``cpu_moe.json``: rows ``{"table", "T", "E", "K", "H", "I", "active", "us", ...}``; of the floor
table also ``{"isa", "expert_mb", "us_interval", "floor_us", "share", "bound"}``.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks._common import interleaved_median, result_path, write_result
from benchmarks._cpu_floor import HEADER, SIZES, floor_rows, line
from sere_sglang.cpu import isa as cpu_isa
from sere_sglang.cpu.isa import ISAS
from sere_sglang.cpu.moe import fused_moe_packed, native_module
from sere_sglang.cpu.packed import PackedExperts
from sere_sglang.errors import exit_on_error

SHAPES = ((32, 4, 256, 96), (48, 6, 256, 64), (64, 8, 1024, 512), (128, 8, 512, 256))
TABLES = ("native", "active", "floor")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Layer:
    """Random weights of one MoE layer, named as SGLang names them."""

    def __init__(self, num_experts: int, hidden_size: int, inter_size: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
            return values.to(torch.bfloat16)

        self.num_experts = num_experts
        self.w13_weight = weight(num_experts, 2 * inter_size, hidden_size)
        self.w2_weight = weight(num_experts, hidden_size, inter_size)
        self.packed = PackedExperts.pack(
            native_module(), self.w13_weight, self.w2_weight, in_place=False
        )
        self.hidden_size = hidden_size


def route(tokens: int, experts: int, top_k: int, active: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts per row, out of the first `active`; int32 ``[T, K]``, float32 ``[T, K]``."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.randn(tokens, experts, generator=generator)
    scores[:, active:] = float("-inf")
    weights, ids = scores.softmax(-1).topk(top_k)
    return ids.to(torch.int32), weights


def native(layer: Layer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native

    config = SimpleNamespace(
        apply_router_weight_on_input=False,
        activation="silu",
        gemm1_alpha=None,
        gemm1_clamp_limit=None,
    )
    return moe_forward_native(layer, hidden, (weights, ids, None), config)


def against_native(layer: Layer, tokens: int, top_k: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, layer.hidden_size, generator=generator).to(torch.bfloat16)
    ids, weights = route(tokens, layer.num_experts, top_k, layer.num_experts)
    seconds = interleaved_median(
        {
            "ours": lambda: fused_moe_packed(hidden, layer.packed, ids, weights),
            "native": lambda: native(layer, hidden, ids, weights),
        }
    )
    row = shape_row("native", layer, tokens, top_k, int(ids.unique().numel()))
    row |= {"isa": cpu_isa.isa(), "us": seconds["ours"] * 1e6}
    row |= {"us_native": seconds["native"] * 1e6, "speedup": seconds["native"] / seconds["ours"]}
    return row


def by_active(layer: Layer, tokens: int, top_k: int, active: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, layer.hidden_size, generator=generator).to(torch.bfloat16)
    ids, weights = route(tokens, layer.num_experts, top_k, active)
    seconds = interleaved_median(
        {"auto": lambda: fused_moe_packed(hidden, layer.packed, ids, weights)}
    )
    row = shape_row("active", layer, tokens, top_k, int(ids.unique().numel()))
    row["us"] = seconds["auto"] * 1e6
    bytes_read = row["active"] * 3 * row["H"] * row["I"] * 2
    row["weights_gb_s"] = bytes_read / seconds["auto"] / 1e9
    return row


def shape_row(table: str, layer: Layer, tokens: int, top_k: int, active: int) -> dict[str, Any]:
    return {
        "table": table,
        "T": tokens,
        "E": layer.num_experts,
        "K": top_k,
        "H": layer.hidden_size,
        "I": layer.w2_weight.shape[2],
        "active": active,
    }


def native_table(quick: bool) -> list[dict[str, Any]]:
    rows = []
    print(f"{'E,K,H,I':>18} {'T':>4} {'active':>6} {'ours us':>10} {'native us':>10} {'ratio':>6}")
    for experts, top_k, hidden_size, inter_size in SHAPES:
        layer = Layer(experts, hidden_size, inter_size)
        name = f"{experts},{top_k},{hidden_size},{inter_size}"
        for t in TOKENS[::3] if quick else TOKENS:
            row = against_native(layer, t, top_k)
            rows.append(row)
            print(
                f"{name:>18} {t:>4} {row['active']:>6} {row['us']:>10.0f} "
                f"{row['us_native']:>10.0f} {row['speedup']:>6.2f}",
                flush=True,
            )
    print(f"lowest ratio to moe_forward_native: {min(row['speedup'] for row in rows):.2f}\n")
    return rows


def active_table() -> list[dict[str, Any]]:
    rows = []
    print(f"{'E,K,H,I':>18} {'T':>4} {'active':>6} {'us':>10} {'us/expert':>10} {'GB/s':>6}")
    for experts, top_k, hidden_size, inter_size in SHAPES[2:]:
        layer = Layer(experts, hidden_size, inter_size)
        for active in (8, 16, 32, 64, 128)[: 5 if experts == 128 else 4]:
            row = by_active(layer, 64, top_k, active)
            rows.append(row)
            print(
                f"{f'{experts},{top_k},{hidden_size},{inter_size}':>18} {64:>4} {row['active']:>6} "
                f"{row['us']:>10.0f} {row['us'] / row['active']:>10.1f} "
                f"{row['weights_gb_s']:>6.1f}",
                flush=True,
            )
    print()
    return rows


def floor_table(isas: list[str], sizes: list[int], quick: bool) -> list[dict[str, Any]]:
    print(f"compiling, where not done before: {', '.join(isas)}", flush=True)
    for isa in isas:
        native_module(isa)
    rows = []
    print(HEADER)
    for row in floor_rows(isas, sizes, *(((4, 64), (25, 100)) if quick else ())):
        rows.append(row)
        print(line(row), flush=True)
    for isa in isas:
        shares = [row["share"] for row in rows if row["isa"] == isa]
        met = sum(share >= 0.8 for share in shares)
        print(f"{isa}: lowest share {min(shares):.0%}; 80% or more in {met} of {len(shares)} cells")
    return rows


def _rows_of_others(tables: Sequence[str]) -> list[dict[str, Any]]:
    """What the file has of tables that are not run again, each row with the day it was measured."""
    path = result_path("cpu_moe")
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    kept = [row for row in before["rows"] if row["table"] not in tables]
    return [{"date": before["date"]} | row for row in kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cells")
    parser.add_argument("--table", nargs="*", choices=TABLES, default=TABLES, help="which tables")
    parser.add_argument("--isa", nargs="*", choices=ISAS, help="of the floor table, else all here")
    parser.add_argument("--mb", nargs="*", type=int, choices=SIZES, default=list(SIZES))
    arguments = parser.parse_args()
    with exit_on_error():
        if os.environ.get(cpu_isa.VARIABLE):
            isas = [cpu_isa.isa()]
        else:
            isas = [name for name in cpu_isa.executable() if name != cpu_isa.PORTABLE]
        for name in arguments.isa or ():
            cpu_isa.check_executable(name, "--isa")
    rows = _rows_of_others(arguments.table)
    if "native" in arguments.table:
        rows += native_table(arguments.quick)
    if "active" in arguments.table:
        rows += active_table()
    if "floor" in arguments.table:
        rows += floor_table(arguments.isa or isas or ["portable"], arguments.mb, arguments.quick)
    print(f"wrote {write_result('cpu_moe', rows)}")


if __name__ == "__main__":
    main()
