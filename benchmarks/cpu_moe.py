"""The CPU MoE runner against SGLang's ``moe_forward_native``, and its time by active experts.

    python -m benchmarks.cpu_moe [--quick]

The routing has no expert twice in a row, as the native path breaks on those. Writes
``cpu_moe.json``: rows ``{"table", "T", "E", "K", "H", "I", "active", "us", ...}``.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks._common import interleaved_median, write_result
from sere_sglang.backend.cpu_moe import choose_impl, fused_moe

SHAPES = ((32, 4, 256, 96), (48, 6, 256, 64), (64, 8, 1024, 512), (128, 8, 512, 256))
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


def against_native(layer: Layer, tokens: int, top_k: int, impls: list[str]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, layer.hidden_size, generator=generator).to(torch.bfloat16)
    ids, weights = route(tokens, layer.num_experts, top_k, layer.num_experts)

    def run(impl: str) -> torch.Tensor:
        return fused_moe(
            hidden, layer.w13_weight, layer.w2_weight, ids, weights, activation="silu", impl=impl
        )

    functions = {impl: (lambda impl=impl: run(impl)) for impl in impls}
    functions["native"] = lambda: native(layer, hidden, ids, weights)
    seconds = interleaved_median(functions)
    row = shape_row("native", layer, tokens, top_k, int(ids.unique().numel()))
    row |= {"chosen": choose_impl(hidden, layer.w2_weight, ids), "us": seconds["auto"] * 1e6}
    row |= {f"us_{name}": value * 1e6 for name, value in seconds.items() if name != "auto"}
    row["speedup"] = seconds["native"] / seconds["auto"]
    return row


def by_active(layer: Layer, tokens: int, top_k: int, active: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, layer.hidden_size, generator=generator).to(torch.bfloat16)
    ids, weights = route(tokens, layer.num_experts, top_k, active)
    seconds = interleaved_median(
        {"auto": lambda: fused_moe(hidden, layer.w13_weight, layer.w2_weight, ids, weights)}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--impl", nargs="*", default=[], help="time these implementations too")
    arguments = parser.parse_args()
    tokens = TOKENS[::3] if arguments.quick else TOKENS
    rows: list[dict[str, Any]] = []

    print(f"{'E,K,H,I':>18} {'T':>4} {'active':>6} {'ours us':>10} {'native us':>10} {'ratio':>6}")
    for experts, top_k, hidden_size, inter_size in SHAPES:
        layer = Layer(experts, hidden_size, inter_size)
        name = f"{experts},{top_k},{hidden_size},{inter_size}"
        for t in tokens:
            row = against_native(layer, t, top_k, ["auto", *arguments.impl])
            rows.append(row)
            others = " ".join(f"{i} {row[f'us_{i}']:.0f}" for i in arguments.impl)
            print(
                f"{name:>18} {t:>4} {row['active']:>6} {row['us']:>10.0f} "
                f"{row['us_native']:>10.0f} {row['speedup']:>6.2f}  {others}",
                flush=True,
            )

    print(f"\n{'E,K,H,I':>18} {'T':>4} {'active':>6} {'us':>10} {'us/expert':>10} {'GB/s':>6}")
    for experts, top_k, hidden_size, inter_size in SHAPES[2:]:
        layer = Layer(experts, hidden_size, inter_size)
        for active in (8, 16, 32, 64, 128)[: 5 if experts == 128 else 4]:
            row = by_active(layer, 64, top_k, active)
            rows.append(row)
            print(
                f"{f'{experts},{top_k},{hidden_size},{inter_size}':>18} {64:>4} {row['active']:>6} "
                f"{row['us']:>10.0f} {row['us'] / row['active']:>10.1f} {row['weights_gb_s']:>6.1f}"
            )

    lowest = min(row["speedup"] for row in rows if row["table"] == "native")
    print(f"\nlowest ratio to moe_forward_native: {lowest:.2f}")
    print(f"wrote {write_result('cpu_moe', rows)}")


if __name__ == "__main__":
    main()
