"""Re-routing on the CPU: ours against the torch reference and the published operation sequence.

    python -m benchmarks.cpu_reroute [--quick] [--rules]

``us_native`` calls the compiled function, ``us`` the public in-place op (argument checks and
torch's dispatch included). Writes ``cpu_reroute.json``: rows ``{"T", "E", "K", "us", ...}``.
Then every rule of ``apply_rule`` at one size, into ``cpu_rules.json``; ``--rules``: only those.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import published_sequence
from benchmarks._common import interleaved_median, random_similarity, write_result
from sere_sglang.cpu.moe import fused_moe
from sere_sglang.ops import LayerTable, apply_rule, encode_control, reroute_
from sere_sglang.ops.cpu import reroute as native
from sere_sglang.ops.cpu import rules as native_rules
from sere_sglang.ops.reference import reroute as reference
from sere_sglang.ops.reference import rules as reference_rules
from sere_sglang.ops.rules_call import RuleCall
from sere_sglang.ops.surrogates import Compensation, Surrogates, compensate_

TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024)
SHAPES = ((60, 4), (64, 6), (128, 8), (256, 8), (512, 10))  # (E, K)
PRIMARY_K = 2
THRESHOLD = 0.3
RULES_AT = (64, 128, 8)  # (T, E, K)
RULE_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "similarity S=2": ("similarity", {"primary_k": PRIMARY_K}),
    "piggyback k0=2": ("piggyback", {"k0": 2}),
    "budget B=64": ("budget", {"budget": 64}),
    "budget B=64, truncate": ("budget", {"budget": 64, "fill": "truncate"}),
    "topk k0=4": ("topk", {"k0": 4}),
    "energy .02": ("energy", {"loss": 0.02}),
    "energy .02, fill .5": ("energy", {"loss": 0.02, "fill_weight": 0.5, "renormalize": 0.25}),
}


def make_inputs(
    tokens: int, experts: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids int32 and weights float32 ``[T, K]`` of a skewed router, best first, and a similarity
    matrix ``[E, E]``."""
    generator = torch.Generator().manual_seed(tokens * experts)
    popular = torch.randn(experts, generator=generator)
    scores = popular + torch.randn(tokens, experts, generator=generator)
    similarity = random_similarity(experts, generator)
    weights, ids = scores.softmax(dim=1).topk(top_k)
    return ids.to(torch.int32), weights, similarity


def measure(tokens: int, experts: int, top_k: int, budget_s: float) -> dict[str, float]:
    ids, weights, similarity = make_inputs(tokens, experts, top_k)
    table = LayerTable.build(similarity)
    control = encode_control(enabled=True, num_valid=-1, classes=[(PRIMARY_K, THRESHOLD)])
    work, work_weights = torch.empty_like(ids), torch.empty_like(weights)
    operands = (work, work_weights, table, control)

    def in_place(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            work.copy_(ids)  # their cost, about two microseconds, is in every figure
            work_weights.copy_(weights)
            function()

        return run

    functions = {
        "us": in_place(lambda: reroute_(*operands, impl="cpu")),
        "us_native": in_place(lambda: native.reroute_(*operands, None, None, True)),
        "us_torch": in_place(lambda: reference.reroute_(*operands, None, None, True)),
        "us_published": lambda: work.copy_(
            published_sequence.run_torch(ids, similarity, PRIMARY_K, THRESHOLD)
        ),
    }
    results = []
    for function in functions.values():
        function()
        results.append(work.clone())
    for other in results[1:3]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    in_place(lambda: reroute_(*operands, distinct=False, impl="cpu"))()
    torch.testing.assert_close(results[3], work, rtol=0, atol=0)  # published: as rows come

    row: dict[str, float] = {"T": tokens, "E": experts, "K": top_k}
    row |= {
        name: seconds * 1e6
        for name, seconds in interleaved_median(functions, budget_s=budget_s).items()
    }
    row["times_torch"] = row["us_torch"] / row["us"]
    row["times_published"] = row["us_published"] / row["us"]
    return row


def measure_rules(budget_s: float) -> list[dict[str, Any]]:
    """Every rule at one size: the public function (checks and new tensors included), and C++."""
    tokens, experts, top_k = RULES_AT
    generator = torch.Generator().manual_seed(tokens * experts)
    popular = torch.randn(experts, generator=generator)
    scores = (popular + torch.randn(tokens, experts, generator=generator)).softmax(dim=1)
    weights, ids = scores.topk(top_k)
    weights = weights / weights.sum(dim=1, keepdim=True)
    similarity = make_inputs(tokens, experts, top_k)[2]
    rows: list[dict[str, Any]] = []
    print(f"\n{'rule':24}{'active':>8}{'us':>10}{'us_native':>10}{'us_torch':>10}")
    for name, (rule, options) in RULE_OPTIONS.items():
        inputs: dict[str, Any] = {"scores": scores, "similarity": similarity}
        call = RuleCall(
            rule=rule,
            ids=ids.to(torch.int32),
            weights=weights,
            num_experts=experts,
            num_valid=tokens,
            **inputs,
            keep=options.get("primary_k", options.get("k0", 1)),
            truncate="fill" in options,
            **{key: options[key] for key in options.keys() & RuleCall.__dataclass_fields__},
        )
        functions = {
            "us": functools.partial(apply_rule, rule, ids, weights, **inputs, **options),
            "us_native": functools.partial(native_rules.apply, call),
            "us_torch": functools.partial(reference_rules.apply, call),
        }
        results = [function() for function in functions.values()]
        assert all(torch.equal(r.ids, results[0].ids) for r in results)
        active = int(results[0].active.sum())
        seconds = interleaved_median(functions, budget_s=budget_s)
        row: dict[str, Any] = {"rule": name, "T": tokens, "E": experts, "K": top_k}
        row |= {"active": active} | {key: value * 1e6 for key, value in seconds.items()}
        rows.append(row)
        figures = "".join(f"{row[key]:10.1f}" for key in ("us", "us_native", "us_torch"))
        print(f"{name:24}{active:8}{figures}", flush=True)
    lost = apply_rule("energy", ids, weights, scores=scores, loss=0.02).lost
    assert lost is not None
    return rows + [measure_surrogates(lost, rank, budget_s) for rank in (8, 32)]


def measure_surrogates(lost: torch.Tensor, rank: int, budget_s: float) -> dict[str, Any]:
    """What makes up for what ``energy .02`` lost, in a layer of hidden size 2048: behind any
    runner, and what it adds to the CPU runner, which has it done with the experts at hand."""
    rows, experts, hidden, inter = *lost.shape, 2048, 256
    inward, outward = torch.randn(2, experts, rank, hidden)
    layer = Surrogates.build(inward, outward, torch.randn(experts, hidden), device="cpu")
    x, output = torch.randn(2, rows, hidden).bfloat16()
    compensation = Compensation(lost, layer)
    w13 = torch.randn(experts, 2 * inter, hidden).bfloat16()
    w2 = torch.randn(experts, hidden, inter).bfloat16()
    ids = torch.arange(rows)[:, None] % 8  # what the batch still loads
    run = functools.partial(fused_moe, x, w13, w2, ids, torch.ones(rows, 1))
    seconds = interleaved_median(
        {
            "us": functools.partial(compensate_, output, x, compensation),
            "us_torch": functools.partial(compensate_, output, x, compensation, impl="torch"),
            "without": run,
            "with": functools.partial(run, compensation=compensation),
        },
        budget_s=budget_s,
    )
    us = {key: value * 1e6 for key, value in seconds.items()}
    us["us_in_runner"] = us.pop("with") - us.pop("without")
    slots = int((lost > 0).sum())
    megabytes = layer.num_bytes / experts * int(lost.any(dim=0).sum()) / 1e6
    name = f"surrogates of rank {rank}"
    figures = f"in the runner {us['us_in_runner']:.0f} us, behind it {us['us']:.0f}, "
    print(
        f"{name:24}{slots:8} slots, {megabytes:.2f} MB: {figures}torch {us['us_torch']:.0f}",
        flush=True,
    )
    return {
        "rule": name,
        "T": rows,
        "E": experts,
        "H": hidden,
        "slots": slots,
        "mb": megabytes,
        **us,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--rules", action="store_true", help="only the rules of apply_rule")
    options = parser.parse_args()
    budget_s = 0.2 if options.quick else 1.5
    torch.set_num_threads(1)
    native.build()
    if not options.rules:
        measure_all(budget_s)
    print(write_result("cpu_rules", measure_rules(budget_s), threads=1))


def measure_all(budget_s: float) -> None:
    rows = []
    columns = ("us", "us_native", "us_torch", "us_published", "times_torch", "times_published")
    print("    T   E  K " + "".join(f"{name:>16}" for name in columns))
    for experts, top_k in SHAPES:
        for tokens in TOKENS:
            row = measure(tokens, experts, top_k, budget_s)
            rows.append(row)
            print(
                f"{tokens:5} {experts:3} {top_k:2} " + "".join(f"{row[c]:16.1f}" for c in columns),
                flush=True,
            )
    print(write_result("cpu_reroute", rows, threads=1, primary_k=PRIMARY_K, threshold=THRESHOLD))


if __name__ == "__main__":
    main()
