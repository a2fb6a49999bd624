"""The inputs of ``benchmarks.op``: one size, many calls, each with tensors of its own."""

from __future__ import annotations

import torch

from benchmarks._common import random_similarity
from sere_sglang.ops import LayerTable, encode_control, new_counters
from sere_sglang.ops.reference import reroute as reference

PRIMARY_K = 2
THRESHOLD = 0.3


class OpCase:
    """T, E, K and `calls` sets of inputs. Calls write to ids, weights and ids_out [calls, T, K].

    ids holds what a call re-routes in place, best first; logits [calls, T, E] what it starts from
    where it picks the experts too.
    """

    def __init__(self, tokens: int, experts: int, top_k: int, calls: int, device: str) -> None:
        self.tokens, self.experts, self.top_k, self.calls = tokens, experts, top_k, calls
        self.device = device
        generator = torch.Generator().manual_seed(tokens * experts + top_k)
        popular = torch.randn(experts, generator=generator)
        noise = torch.randn(calls, tokens, experts, generator=generator)
        similarity = random_similarity(experts, generator)

        self.logits = (popular + noise).to(device)
        weights, ids = self.logits.softmax(dim=-1).topk(top_k, dim=-1)
        self._ids = ids.to(torch.int32)
        self._weights = weights / weights.sum(dim=-1, keepdim=True)
        self.ids, self.weights = self._ids.clone(), self._weights.clone()
        table = LayerTable.build(similarity, device=device)
        neighbors = table.neighbors
        assert neighbors is not None
        self.tables = [
            LayerTable(table.similarity.clone(), neighbors.clone()) for _ in range(calls)
        ]
        classes = [(PRIMARY_K, THRESHOLD)]
        self.control = encode_control(enabled=True, num_valid=-1, classes=classes).to(device)
        self.control_off = encode_control(enabled=False, num_valid=-1, classes=classes).to(device)
        self.counters = new_counters(calls, device)
        self.results: dict[int, torch.Tensor] = {}  # ids [T, K] of calls that return them
        self._expected = self._reroute_by_reference(similarity, distinct=True)
        self._repeated = self._reroute_by_reference(similarity, distinct=False)

    def __str__(self) -> str:
        return f"T={self.tokens} E={self.experts} K={self.top_k}"

    def restore(self) -> None:
        """Undo what calls did; afterwards ids, weights and logits are in the L2 cache."""
        self.ids.copy_(self._ids)
        self.weights.copy_(self._weights)
        self.logits.mul_(1.0)

    def check(self, name: str) -> None:
        """Raise unless call 0 has just given the reference's ids."""
        if name == "empty":
            return
        got = self.results.pop(0, self.ids[0])
        want = self._repeated if name in ("published", "repeated") else self._expected
        if name == "topk_only":
            want = self._ids[0].cpu()
        if not torch.equal(got.cpu(), want):
            wrong = int((got.cpu() != want).sum())
            raise AssertionError(f"{wrong} of {want.numel()} ids differ from the reference")

    def _reroute_by_reference(self, similarity: torch.Tensor, distinct: bool) -> torch.Tensor:
        ids, weights = self._ids[0].cpu().clone(), self._weights[0].cpu().clone()
        control = self.control.cpu()
        reference.reroute_(ids, weights, LayerTable(similarity), control, None, None, distinct)
        return ids
