"""The rules beside ``similarity`` on a GPU: what one layer's kernels take, and its surrogates.

    python -m benchmarks.rules [--quick] [--dry-run] [--budget SECONDS]

Timed as in benchmarks/op.py, by replays of a CUDA graph. ``off`` is a layer whose rule block names
``similarity``, ``surrogates`` what one of rank 8 adds before and behind the experts under
``energy``, ``surrogates off`` the same where nothing was lost. Every rule is timed in Triton and,
where that is at hand, in CUDA C++, behind top-k and fused with it (``fused``: softmax and top-k are
in its figure, and ``off`` is those alone), and compared with the reference first. Writes
``rules.json``: rows ``{"rule", "impl", "T", "E", "K", "us", "us_warm", ...}``. ``--dry-run`` goes
the same way on a CPU, with tiny sizes and the CPU's implementations in place of the GPU's; its
figures mean nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import write_result
from benchmarks._timing import Candidate, GraphTimer, HostTimer, Timer, cuda_info, first_line
from benchmarks.op import arguments
from sere_sglang.ops.cuda import library, rules_fused
from sere_sglang.ops.cuda.rules_fused import Selected, fused_topk_rule
from sere_sglang.ops.registry import UnavailableError
from sere_sglang.ops.rule_block import block_of, encode_rule
from sere_sglang.ops.rule_ops import add_compensation_, begin_compensation
from sere_sglang.ops.rules import load_rules
from sere_sglang.ops.rules_call import LostSlots, RuleCall
from sere_sglang.ops.rules_device import ApplyInPlace
from sere_sglang.ops.surrogates import Compensation, Surrogates, compensate_

TOKENS: tuple[int, ...] = (1, 8, 32, 128, 256, 1024)
SHAPES: tuple[tuple[int, int], ...] = ((128, 8), (512, 10))  # (E, K); Triton compiles each anew
CALLS = 16
RANK, HIDDEN = 8, 2048
NAMES = ("off", "piggyback", "topk", "budget", "energy", "surrogates", "surrogates off")
IMPLS = ("triton", "cuda", "fused")


class RuleCase:
    """T, E, K and `calls` sets of rows, which calls change in place."""

    def __init__(self, tokens: int, experts: int, top_k: int, calls: int, device: str) -> None:
        self.tokens, self.experts, self.top_k, self.calls = tokens, experts, top_k, calls
        self.device = device
        generator = torch.Generator().manual_seed(tokens * experts + top_k)
        popular = torch.randn(experts, generator=generator)
        logits = popular + torch.randn(calls, tokens, experts, generator=generator)
        self.logits = logits.to(device)
        self.scores = self.logits.softmax(-1)
        weights, ids = self.scores.topk(top_k, dim=-1)
        self._ids = ids.to(torch.int32)
        self._weights = weights / weights.sum(dim=-1, keepdim=True)
        self.ids, self.weights = self._ids.clone(), self._weights.clone()
        self.counters = torch.zeros(calls, 7, dtype=torch.int64, device=device)
        self.hidden = torch.randn(tokens, HIDDEN, generator=generator).bfloat16().to(device)
        self.output = torch.zeros_like(self.hidden)
        inward, outward = torch.randn(2, experts, RANK, HIDDEN, generator=generator)
        bias = torch.randn(experts, HIDDEN, generator=generator)
        self.surrogates = Surrogates.build(inward, outward, bias, device=device)

    def __str__(self) -> str:
        return f"T={self.tokens} E={self.experts} K={self.top_k}"

    def restore(self) -> None:
        self.ids.copy_(self._ids)
        self.weights.copy_(self._weights)

    def rule_call(self, rule: str, i: int = 0) -> RuleCall:
        return RuleCall(
            rule=rule,
            ids=self._ids[i],
            weights=self._weights[i],
            num_experts=self.experts,
            num_valid=self.tokens,
            scores=self.scores[i],
            keep=2 if rule in ("piggyback", "topk") else 1,
            budget=max(1, self.experts // 4),
            loss=0.02,
            fill_weight=0.5,
            renormalize=1.0,
        )

    def candidate(self, name: str, impl: str) -> Candidate:
        """Raises where its first call does not give what the reference does."""
        if name.startswith("surrogates"):
            return Candidate(self._surrogates(name == "surrogates"))
        if impl == "fused":
            return self._fused(name)
        calls = self._off(impl) if name == "off" else self._rule(name, impl)
        self.restore()
        calls[0]()
        want: Sequence[Any] = (self._ids[0], self._weights[0])
        if name != "off":
            want = load_rules("torch", self.device).apply(self.rule_call(name))[:2]
        if not all(map(torch.equal, (self.ids[0], self.weights[0]), want)):
            raise AssertionError("ids or weights differ from the reference")
        return Candidate(calls, self.restore)

    def _apply(self, apply_: ApplyInPlace, block: torch.Tensor, i: int) -> None:
        apply_(
            self.ids[i], self.weights[i], self.scores[i], block, self.experts,
            counters=self.counters[i], lost=LostSlots.none(self.ids[i]),
        )  # fmt: skip

    def _off(self, impl: str) -> list[Any]:
        if self.device == "cpu":
            return [lambda: None] * self.calls
        return self._calls(impl, encode_rule("similarity"))

    def _rule(self, rule: str, impl: str) -> list[Any]:
        if self.device == "cpu":
            return [partial(self._stand_in, rule, i) for i in range(self.calls)]
        return self._calls(impl, block_of(self.rule_call(rule)))

    def _calls(self, impl: str, block: torch.Tensor) -> list[Any]:
        module: Any = load_rules(impl, self.device)
        on_device = block.to(self.device)
        return [partial(self._apply, module.apply_, on_device, i) for i in range(self.calls)]

    def _fused(self, name: str) -> Candidate:
        """On the weights and scores that the kernel itself computes the rule is the reference's."""
        switched_off, call = encode_rule("similarity").to(self.device), self.rule_call(name)
        block = switched_off if name == "off" else block_of(call).to(self.device)

        def run(i: int, block: torch.Tensor = block) -> Selected:
            return fused_topk_rule(
                self.logits[i], self.top_k, True, block,
                counters=self.counters[i], lost=LostSlots.none(self.ids[i]),
            )  # fmt: skip

        plain, got = run(0, switched_off), run(0)
        if not torch.equal(plain.ids, self._ids[0]):
            raise AssertionError("ids differ from torch's top-k")
        if name != "off":
            call = replace(call, ids=plain.ids, weights=plain.weights, scores=got.scores)
            want = load_rules("torch", self.device).apply(call)
            if not (torch.equal(got.ids, want.ids) and torch.equal(got.weights, want.weights)):
                raise AssertionError("ids or weights differ from the reference")
        return Candidate([partial(run, i) for i in range(self.calls)])

    def _stand_in(self, rule: str, i: int) -> None:
        routed = load_rules("auto", "cpu").apply(self.rule_call(rule, i), self.counters[i])
        self.ids[i].copy_(routed.ids)
        self.weights[i].copy_(routed.weights)

    def _surrogates(self, lost: bool) -> list[Any]:
        routed = load_rules("torch", self.device).apply(self.rule_call("energy"))
        assert routed.lost is not None
        gone = routed.lost * float(lost)
        slots = LostSlots(gone.gather(1, self._ids[0].long()), self._ids[0])

        def call() -> None:
            if self.device == "cpu":
                compensate_(self.output, self.hidden, Compensation(gone, self.surrogates))
                return
            inner = begin_compensation(self.hidden, slots, self.surrogates, 1.0)
            add_compensation_(self.output, inner, slots, self.surrogates, 1.0)

        return [call] * self.calls


def present(impls: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those that this machine's GPU can have, and what broke."""
    found, failed = [], []
    for impl in impls:
        try:
            _build(impl)
        except UnavailableError as error:
            print(f"not timed: {error}")
        except Exception as error:  # one that does not build must not take the other along
            failed.append(f"{impl}: {first_line(error)}")
        else:
            found.append(impl)
    return found, failed


def _build(impl: str) -> None:
    if impl != "fused":
        load_rules(impl, "cuda")
        return
    reason = library.is_available("cuda")
    if reason is not None:
        raise UnavailableError(f"fused: {reason}")
    rules_fused.build()


def candidates_of(impls: Sequence[str]) -> list[tuple[str, str]]:
    """Names with the implementations that they are timed in; surrogates are in Triton alone."""
    return [
        (name, impl) for name in NAMES for impl in (IMPLS[:1] if name.startswith("surr") else impls)
    ]


def measure(
    case: RuleCase, impls: Sequence[str], timer: Timer, rounds: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of one size, and what was wrong or broke."""
    candidates: dict[str, Candidate] = {}
    named: dict[str, dict[str, str]] = {}
    failed = []
    for name, impl in candidates_of(impls):
        try:
            candidates[f"{name}, {impl}"] = case.candidate(name, impl)
        except Exception as error:  # one that breaks must not take the others along
            failed.append(f"{name}, {impl} at {case}: {first_line(error)}")
        named[f"{name}, {impl}"] = {"rule": name, "impl": impl}
    size = {"T": case.tokens, "E": case.experts, "K": case.top_k}
    rows: list[dict[str, Any]] = [
        {
            **named[name],
            **size,
            "us": round(timing.cold, 3),
            "us_warm": round(timing.warm, 3),
            "us_spread": round(timing.spread, 3),
        }
        for name, timing in timer.measure(candidates, rounds).items()
    ]
    return rows, failed


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv, __doc__)
    began = time.monotonic()
    tokens, shapes, rounds = TOKENS, SHAPES, 11
    if options.quick:
        tokens, shapes, rounds = (1, 32, 256), SHAPES[:1], 7
    if options.dry_run:
        tokens, shapes, rounds = (1, 5), ((16, 4), (8, 3)), 3
    elif not torch.cuda.is_available():
        print("no GPU: nothing measured (--dry-run goes through it on a CPU)", file=sys.stderr)
        return 2
    device = "cpu" if options.dry_run else "cuda"
    timer: Timer = HostTimer() if options.dry_run else GraphTimer()
    rows: list[dict[str, Any]] = []
    impls, failed = (list(IMPLS[:1]), []) if options.dry_run else present(IMPLS)

    def write() -> Path:
        return write_result(
            "rules", rows, **cuda_info(), dry_run=options.dry_run, calls_per_graph=CALLS,
            rounds=rounds, rank=RANK, hidden=HIDDEN, failed=failed + timer.errors,
        )  # fmt: skip

    for experts, top_k in shapes:
        for num_tokens in tokens:
            if time.monotonic() - began > options.budget:
                failed.append(f"stopped after {options.budget:.0f} s")
                break
            try:
                case = RuleCase(num_tokens, experts, top_k, 3 if options.dry_run else CALLS, device)
                new_rows, new_failed = measure(case, impls, timer, rounds)
            except Exception as error:
                failed.append(f"T={num_tokens} E={experts} K={top_k}: {first_line(error)}")
                continue
            rows += new_rows
            failed += new_failed
            write()  # what is there survives being stopped
        if failed and failed[-1].startswith("stopped"):
            break
    path = write()
    failed += timer.errors
    print_tables(rows)
    print(path)
    for failure in failed:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failed else 0


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """For each implementation a line per size: every rule."""
    print("us per layer, tables not in L2")
    print("  impl    E  K    T " + "".join(f"{name:>15}" for name in NAMES))
    sizes: dict[tuple[str, int, int, int], dict[str, float]] = {}
    for row in rows:
        size = (row["impl"], row["E"], row["K"], row["T"])
        sizes.setdefault(size, {})[row["rule"]] = row["us"]
    for (impl, experts, top_k, num_tokens), us in sizes.items():
        cells = "".join(f"{us[name]:15.2f}" if name in us else f"{'-':>15}" for name in NAMES)
        print(f"{impl:>6} {experts:4} {top_k:2} {num_tokens:4} {cells}")


if __name__ == "__main__":
    sys.exit(main())
