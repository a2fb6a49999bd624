"""Random inputs of `apply_rule`, with the ties, holes and small sets that tests need often.

Needs torch alone; rules_strategies.py draws them by hypothesis.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from sere_sglang.names import RULES
from sere_sglang.ops import Routed
from sere_sglang.ops.rules import applied, load_rules
from sere_sglang.ops.rules_call import RuleCall
from sere_sglang.ops.rules_check import checked
from tests.ops import rules_oracle

T = TypeVar("T")


class Choices(Protocol):
    """Where the cases get their numbers from."""

    def one_of(self, values: Sequence[T]) -> T: ...

    def between(self, low: int, high: int) -> int: ...

    def fraction(self, high: float) -> float: ...


@dataclass
class RandomChoices:
    rng: random.Random

    def one_of(self, values: Sequence[T]) -> T:
        return self.rng.choice(values)

    def between(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def fraction(self, high: float) -> float:
        return rules_oracle.float32(self.rng.uniform(0.0, high))


@dataclass
class Batch:
    rule: str
    ids: torch.Tensor
    weights: torch.Tensor
    options: dict[str, Any]

    def call(self, device: str = "cpu") -> RuleCall:
        tensors = {k: v for k, v in self.options.items() if isinstance(v, torch.Tensor)}
        there = {name: tensor.to(device) for name, tensor in tensors.items()}
        ids, weights = self.ids.to(device), self.weights.to(device)
        return checked(self.rule, ids, weights, **(self.options | there))

    @property
    def is_power(self) -> bool:
        """Whether weights are multiplied by a power, which rounds differently on every machine."""
        return self.rule == "energy" and 0.0 < self.options["renormalize"] < 1.0

    def run(self, impl: str, device: str = "cpu") -> Routed:
        return applied(self.call(device), impl)

    def expected(self) -> rules_oracle.Outcome:
        return rules_oracle.apply(self.case())

    def case(self) -> rules_oracle.Input:
        o = self.options
        rows = self.ids.shape[0]
        protected, fast = o["protected"], o["fast"]
        return rules_oracle.Input(
            rule=self.rule,
            ids=self.ids.tolist(),
            weights=self.weights.tolist(),
            experts=o["scores"].shape[1],
            num_valid=rows if o["num_valid"] is None else o["num_valid"],
            protected=[False] * rows if protected is None else protected.tolist(),
            fast=[False] * rows if fast is None else fast.tolist(),
            fast_keep=o["fast_k"],
            scores=o["scores"].tolist(),
            similarity=o["similarity"].tolist(),
            keep={"similarity": o["primary_k"], "piggyback": o["k0"], "topk": o["k0"]}.get(
                self.rule, 1
            ),
            threshold=o["threshold"],
            budget=o["budget"],
            warmup=o["warmup"],
            truncate=o["fill"] == "truncate",
            loss=rules_oracle.float32(o["loss"]),
            expert_loss=None if o["expert_loss"] is None else o["expert_loss"].tolist(),
            fill_weight=o["fill_weight"],
            renormalize=o["renormalize"],
        )


def make_batch(
    choices: Choices,
    *,
    rules: Sequence[str] = RULES,
    max_rows: int = 24,
    max_experts: int = 40,
    max_k: int = 9,
    shape: tuple[int, int] | None = None,
) -> Batch:
    """shape: E and K; by default up to `max_experts` and `max_k`."""
    rule = choices.one_of(rules)
    lowest_k = 1 if rule in ("budget", "energy") else 2
    if shape is None:
        top_k = choices.between(lowest_k, max_k)
        experts = choices.between(top_k, max_experts)
    else:
        experts, top_k = shape
    few = choices.one_of([True, False])
    rows = choices.between(1, 4) if few else choices.between(0, max_rows)
    generator = torch.Generator().manual_seed(choices.between(0, 2**32 - 1))

    def maybe() -> bool:
        return choices.one_of([False, True])

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    score_levels = choices.one_of([0, 0, 3, 8])
    logits = uniform(rows, experts) * 6
    if score_levels:
        logits = (logits / 6 * score_levels).floor()
    scores = logits.sigmoid() if maybe() else logits.softmax(dim=1)
    if choices.between(0, 5) == 0:
        scores = scores * (uniform(rows, experts) < 0.6)  # experts without any score
    router = choices.one_of(["plain", "biased", "foreign"])
    bias = {
        "plain": torch.zeros(experts),
        "biased": 0.5 * uniform(experts),
        "foreign": 9 * uniform(rows, experts),
    }
    ids = (scores + bias[router]).topk(top_k, dim=1).indices if rows else torch.zeros(0, top_k)
    ids = ids.gather(1, uniform(rows, top_k).argsort(dim=1)) if maybe() else ids
    ids = ids.to(torch.int32 if maybe() else torch.int64)
    weights = scores.gather(1, ids.long())
    if maybe():
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)
    weights = weights * choices.one_of([1.0, 2.5])
    if choices.between(0, 4) == 0:
        weights = (uniform(rows, top_k) * 4).floor() / 4  # ties, and zeros
    holes = choices.one_of([0.0, 0.0, 0.2, 0.8, 1.0])
    ids = torch.where(uniform(rows, top_k) < holes, -1, ids)
    similarity_levels = choices.one_of([3, 1000])
    similarity = (uniform(experts, experts) * similarity_levels).floor() / similarity_levels
    loss = choices.one_of([0.0, 1.0]) if maybe() else choices.fraction(0.25)
    if maybe():  # what one expert has, so that the budget is met exactly
        energy = (weights * weights)[ids == choices.between(0, experts - 1)].sum()
        loss = min(1.0, float(energy) / max(rows, 1))
    return Batch(
        rule=rule,
        ids=ids,
        weights=weights,
        options={
            "scores": scores,
            "similarity": similarity,
            "primary_k": choices.between(1, max(1, top_k - 1)),
            "threshold": choices.one_of([0.0, 0.5, 0.75]),
            "k0": choices.between(1, max(1, top_k - 1)),
            "budget": choices.between(1, experts),
            "warmup": maybe(),
            "fill": choices.one_of(["piggyback", "truncate"]),
            "loss": loss,
            "expert_loss": uniform(experts) * 3 if rule == "energy" and maybe() else None,
            "fill_weight": choices.one_of([0.0, 0.5, 1.25]),
            "renormalize": choices.one_of([0.0, 0.25, 1.0]),
            "num_valid": choices.between(0, rows) if maybe() else None,
            "protected": (uniform(rows) < 0.3) if maybe() else None,
            "fast": (uniform(rows) < 0.5) if rule != "similarity" and maybe() else None,
            "fast_k": choices.between(1, max(1, top_k - 1)),
        },
    )


class Applies(Protocol):
    """Of `sere_sglang.ops.rules.Implementation`."""

    def apply(self, call: RuleCall, counters: torch.Tensor | None = None) -> Routed: ...


def check(batch: Batch, implementation: Applies, device: str = "cpu") -> None:
    """Counters, ids, active experts and what was lost are the reference's and the oracle's, bit for
    bit; weights are the reference's, up to the rounding of a power. The counters of ``similarity``
    are its own kernels'."""
    call = batch.call(device)
    if call.ids.numel() == 0:
        return
    got, counted = _counted(implementation, call)
    want, wanted = _counted(load_rules("torch", "cpu"), batch.call())
    oracle = batch.expected()
    assert torch.equal(counted, wanted)
    assert got.ids.tolist() == want.ids.tolist() == oracle.ids
    assert set(got.active.nonzero().flatten().tolist()) == oracle.active
    assert_routed_equal(got, want, is_power=batch.is_power)


def assert_routed_equal(got: Routed, want: Routed, *, is_power: bool) -> None:
    """Bit for bit; weights but for the rounding of a power, where there is one."""
    assert torch.equal(got.ids.cpu(), want.ids.cpu())
    assert torch.equal(got.active.cpu(), want.active.cpu())
    torch.testing.assert_close(
        got.weights.cpu(), want.weights.cpu(), rtol=3e-6 if is_power else 0, atol=0, equal_nan=True
    )
    assert got.lost is not None and want.lost is not None
    assert torch.equal(got.lost.cpu(), want.lost.cpu())


def _counted(implementation: Applies, call: RuleCall) -> tuple[Routed, torch.Tensor]:
    counters = torch.full((7,), 3, dtype=torch.int64, device=call.ids.device)
    routed = implementation.apply(call, None if call.rule == "similarity" else counters)
    return routed, counters.cpu()


def large_call(rule: str, num_tokens: int, experts: int, top_k: int, device: str) -> RuleCall:
    """With padding, protected and fast rows; too large for the oracle."""
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_tokens, experts, generator=generator)
    scores = (logits + torch.randn(experts, generator=generator)).softmax(-1).to(device)
    weights, ids = scores.topk(top_k)
    return RuleCall(
        rule=rule,
        ids=ids.to(torch.int32),
        weights=weights / weights.sum(1, keepdim=True),
        num_experts=experts,
        num_valid=num_tokens - num_tokens // 9,
        protected=torch.rand(num_tokens, generator=generator).to(device) < 0.01,
        fast=torch.rand(num_tokens, generator=generator).to(device) < 0.2,
        scores=scores,
        keep=2 if rule in ("piggyback", "topk") else 1,
        budget=experts // 3,
        loss=0.05,
        fill_weight=0.5,
        renormalize=1.0,
    )
