"""Random inputs of `apply_rule`, with the ties, holes and small sets that tests need often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from sere_sglang.names import RULES
from sere_sglang.ops import Routed
from sere_sglang.ops.rules import applied
from sere_sglang.ops.rules_check import checked
from tests.ops import rules_oracle


@dataclass
class Batch:
    rule: str
    ids: torch.Tensor
    weights: torch.Tensor
    options: dict[str, Any]

    def run(self, impl: str) -> Routed:
        return applied(checked(self.rule, self.ids, self.weights, **self.options), impl)

    def expected(self) -> rules_oracle.Outcome:
        o = self.options
        rows = self.ids.shape[0]
        protected, fast = o["protected"], o["fast"]
        return rules_oracle.apply(
            rules_oracle.Input(
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
                fill_weight=o["fill_weight"],
                renormalize=o["renormalize"],
            )
        )


@st.composite
def batches(draw: st.DrawFn, max_rows: int = 24, max_experts: int = 40, max_k: int = 9) -> Batch:
    rule = draw(st.sampled_from(RULES))
    lowest_k = 1 if rule in ("budget", "energy") else 2
    top_k = draw(st.integers(lowest_k, max_k))
    experts = draw(st.integers(top_k, max_experts))
    rows = draw(st.integers(1, 4) | st.integers(0, max_rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    score_levels = draw(st.sampled_from([0, 0, 3, 8]))
    logits = uniform(rows, experts) * 6
    if score_levels:
        logits = (logits / 6 * score_levels).floor()
    scores = logits.sigmoid() if draw(st.booleans()) else logits.softmax(dim=1)
    if draw(st.integers(0, 5)) == 0:
        scores = scores * (uniform(rows, experts) < 0.6)  # experts without any score
    router = draw(st.sampled_from(["plain", "biased", "foreign"]))
    bias = {
        "plain": torch.zeros(experts),
        "biased": 0.5 * uniform(experts),
        "foreign": 9 * uniform(rows, experts),
    }
    ids = (scores + bias[router]).topk(top_k, dim=1).indices if rows else torch.zeros(0, top_k)
    ids = ids.gather(1, uniform(rows, top_k).argsort(dim=1)) if draw(st.booleans()) else ids
    ids = ids.to(torch.int32 if draw(st.booleans()) else torch.int64)
    weights = scores.gather(1, ids.long())
    if draw(st.booleans()):
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)
    weights = weights * draw(st.sampled_from([1.0, 2.5]))
    if draw(st.integers(0, 4)) == 0:
        weights = (uniform(rows, top_k) * 4).floor() / 4  # ties, and zeros
    holes = draw(st.sampled_from([0.0, 0.0, 0.2, 0.8, 1.0]))
    ids = torch.where(uniform(rows, top_k) < holes, -1, ids)
    similarity_levels = draw(st.sampled_from([3, 1000]))
    similarity = (uniform(experts, experts) * similarity_levels).floor() / similarity_levels
    loss = draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 0.25, width=32))
    if draw(st.booleans()):  # what one expert has, so that the budget is met exactly
        energy = (weights * weights)[ids == draw(st.integers(0, experts - 1))].sum()
        loss = min(1.0, float(energy) / max(rows, 1))
    return Batch(
        rule=rule,
        ids=ids,
        weights=weights,
        options={
            "scores": scores,
            "similarity": similarity,
            "primary_k": draw(st.integers(1, max(1, top_k - 1))),
            "threshold": draw(st.sampled_from([0.0, 0.5, 0.75])),
            "k0": draw(st.integers(1, max(1, top_k - 1))),
            "budget": draw(st.integers(1, experts)),
            "warmup": draw(st.booleans()),
            "fill": draw(st.sampled_from(["piggyback", "truncate"])),
            "loss": loss,
            "fill_weight": draw(st.sampled_from([0.0, 0.5, 1.25])),
            "renormalize": draw(st.sampled_from([0.0, 0.25, 1.0])),
            "num_valid": draw(st.none() | st.integers(0, rows)),
            "protected": (uniform(rows) < 0.3) if draw(st.booleans()) else None,
            "fast": (uniform(rows) < 0.5) if rule != "similarity" and draw(st.booleans()) else None,
            "fast_k": draw(st.integers(1, max(1, top_k - 1))),
        },
    )
