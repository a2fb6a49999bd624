"""All similarity measures of one layer, streamed, against the pairwise loop of the definitions.

    python -m benchmarks.calibration [--experts 64 --hidden 1024 --width 512 --tokens 4096]
    python -m benchmarks.calibration --model demo_model --layer 1

The loop holds every expert's output [E, T, H] in float32 and compares each pair by itself, as the
paper's calibration does; it is timed over a few pairs (--pairs) and multiplied to all of them,
because all would take hours. Both run the experts through the same CPU runner. Writes
``calibration.json`` or ``calibration_<model>.json``: a row for all measures with ``ratio``, then
one per measure of the loop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open

from benchmarks._common import write_result
from benchmarks.cpu_moe import Layer
from sere_sglang.calibration.cka import cka_matrix
from sere_sglang.calibration.collection import CollectionSpec, block_tokens, cka_block
from sere_sglang.calibration.measures import MOMENT_MEASURES, Moments, similarity
from sere_sglang.cpu.moe import fused_moe

CKA = ("cka", "cka-rbf", "cka-polynomial")


def run_all_experts(layer: Layer, rows: torch.Tensor) -> torch.Tensor:
    """[E, n, H], as the collector gets it: one top-1 call over the rows repeated per expert."""
    ids = torch.arange(layer.num_experts, dtype=torch.int32).repeat_interleave(len(rows))[:, None]
    repeated = rows.repeat(layer.num_experts, 1)
    weights = torch.ones(ids.shape)
    outputs = fused_moe(repeated, layer.w13_weight, layer.w2_weight, ids, weights)
    return outputs.view(layer.num_experts, len(rows), -1)


def streamed(
    layer: Layer, rows: torch.Tensor, spec: CollectionSpec
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    sizes = (layer.num_experts, layer.hidden_size, layer.w2_weight.shape[2])
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    moments = Moments(layer.num_experts)
    for part in rows.split(block_tokens(spec, *sizes)):
        routed = torch.zeros(len(part), layer.num_experts, dtype=torch.bool)
        moments.update(run_all_experts(layer, part), routed)
    matrices = {measure: similarity(moments, measure) for measure in MOMENT_MEASURES}
    seconds["moments"] = time.perf_counter() - began
    began = time.perf_counter()
    matrices |= cka_matrix(
        lambda part: run_all_experts(layer, part), rows, CKA, block=cka_block(spec, *sizes)
    )
    seconds["cka"] = time.perf_counter() - began
    return matrices, seconds


def pairwise_loop() -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """One pair of outputs [T, H] float32 at a time, straight from the definitions."""

    def centred(kernel: torch.Tensor) -> torch.Tensor:
        return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()

    def aligned(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (k * m).sum() / (k * k).sum().sqrt() / (m * m).sum().sqrt()

    def linear(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = x - x.mean(0), y - y.mean(0)
        cross, own_x, own_y = y.T @ x, x.T @ x, y.T @ y
        return cross.square().sum() / own_x.norm() / own_y.norm()

    def rbf_kernel(x: torch.Tensor) -> torch.Tensor:
        squares = x.square().sum(1)
        distances = squares[:, None] + squares - 2 * x @ x.T
        return torch.exp(-distances / (2 * distances.var()))

    def rbf(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return aligned(centred(rbf_kernel(x)), centred(rbf_kernel(y)))

    def polynomial(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return aligned(centred((x @ x.T + 1) ** 2), centred((y @ y.T + 1) ** 2))

    return {
        "frobenius": lambda x, y: torch.linalg.norm(x - y),
        "cosine": lambda x, y: (F.cosine_similarity(x, y, dim=1).mean() + 1) / 2,
        "residual": lambda x, y: (x * y).sum().square() / (x * x).sum() / (y * y).sum(),
        "cka": linear,
        "cka-rbf": rbf,
        "cka-polynomial": polynomial,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--model", type=Path, help="a Qwen3-MoE folder, for its weights and sizes")
    parser.add_argument("--layer", type=int, default=1, help="of --model")
    parser.add_argument("--memory-mib", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=3, help="pairs that the loop is timed over")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.model is not None:
        asked.experts, asked.hidden, asked.width = sizes_of(asked.model)
    layer = Layer(asked.experts, asked.hidden, asked.width)
    if asked.model is not None:
        read_experts(layer, asked.model, asked.layer)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(asked.tokens, asked.hidden, generator=generator).to(torch.bfloat16)
    run_all_experts(layer, rows[:64])  # compiles
    spec = CollectionSpec(memory=asked.memory_mib << 20)

    before = peak_mib()
    matrices, seconds = streamed(layer, rows, spec)
    grown = peak_mib() - before
    total = sum(seconds.values())
    print(f"all measures, streamed: {total:.1f} s ({seconds}), peak memory grew {grown:.0f} MiB")

    began = time.perf_counter()
    chosen = sorted({0, 1, asked.experts // 2, asked.experts - 1})
    kept = {e: expert_output(layer, rows, e).float() for e in chosen}
    expert_seconds = (time.perf_counter() - began) / len(chosen) * asked.experts
    pairs = list(itertools.combinations(chosen, 2))[: asked.pairs]
    all_pairs = asked.experts * (asked.experts + 1) // 2
    results: list[dict[str, Any]] = []
    for measure, pair in pairwise_loop().items():
        began = time.perf_counter()
        values = [pair(kept[i], kept[j]).item() for i, j in pairs]
        loop = (time.perf_counter() - began) / len(pairs) * all_pairs
        ours = [matrices[measure][i, j].item() for i, j in pairs]
        if measure == "frobenius":  # distances of a few pairs: compare their ratios
            values = [v / values[0] for v in values]
            ours = [(1 - o) / (1 - matrices[measure][pairs[0]].item()) for o in ours]
        difference = max(abs(a - b) / abs(a) for a, b in zip(values, ours, strict=True))
        results.append({"measure": measure, "loop_seconds": loop, "largest_difference": difference})
        print(f"{measure:15} loop {loop:10.1f} s, relative difference {difference:.1e}", flush=True)
    loop_total = expert_seconds + sum(row["loop_seconds"] for row in results)
    print(f"loop over all {all_pairs} pairs, extrapolated from {len(pairs)}: {loop_total:.0f} s")
    print(f"ratio: {loop_total / total:.1f}")
    summary = {
        "measure": "all",
        "seconds": total,
        **{f"seconds_{name}": value for name, value in seconds.items()},
        "loop_seconds": loop_total,
        "ratio": loop_total / total,
        "peak_growth_mib": grown,
    }
    path = write_result(
        "calibration" if asked.model is None else f"calibration_{asked.model.name}",
        [summary, *results],
        settings={**vars(asked), "model": str(asked.model or "")},
        loop_extrapolated_from_pairs=len(pairs),
    )
    print(f"wrote {path}")


def sizes_of(model: Path) -> tuple[int, int, int]:
    config = json.loads((model / "config.json").read_text())
    return config["num_experts"], config["hidden_size"], config["moe_intermediate_size"]


def read_experts(layer: Layer, model: Path, index: int) -> None:
    with safe_open(str(model / "model.safetensors"), framework="pt") as file:
        for e in range(layer.num_experts):
            at = f"model.layers.{index}.mlp.experts.{e}"
            gate, up, down = (
                file.get_tensor(f"{at}.{name}_proj.weight") for name in ("gate", "up", "down")
            )
            layer.w13_weight[e] = torch.cat([gate, up])
            layer.w2_weight[e] = down


def expert_output(layer: Layer, rows: torch.Tensor, expert: int) -> torch.Tensor:
    ids = torch.full((len(rows), 1), expert, dtype=torch.int32)
    return fused_moe(rows, layer.w13_weight, layer.w2_weight, ids, torch.ones(ids.shape))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
