"""One MoE layer's running statistics, whoever computes its experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from sere_sglang.calibration.cka import cka_matrix
from sere_sglang.calibration.collection import (
    CollectionSpec,
    SurrogateSpec,
    block_tokens,
    cka_block,
)
from sere_sglang.calibration.measures import MOMENT_MEASURES, Moments, similarity
from sere_sglang.calibration.rule_fit import Surrogates, fit_rules
from sere_sglang.calibration.stream import StreamEnergy
from sere_sglang.calibration.surrogate_fit import evaluated_ranks, fit_surrogates
from sere_sglang.calibration.surrogates import SurrogateSums
from sere_sglang.calibration.token_sample import TokenSample, sample_tokens
from sere_sglang.errors import SereError

FITTED = "fitted."
"""In front of the names of fitted tables in `LayerCollector.state`."""
_SUMS = "surrogate_sums."
_SAMPLE = "sample."


class Experts(Protocol):
    """All routed experts of one layer. width: of an expert's intermediate on this rank.
    expert_bytes: of one expert's weights, on all ranks that share it."""

    layer_id: int
    num_experts: int
    hidden_size: int
    width: int
    device: torch.device

    @property
    def expert_bytes(self) -> float: ...

    def outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """[E, n, H] in the layer's dtype: every expert's output for `rows` [n, H]."""


class LayerCollector:
    """One MoE layer's running statistics.

    Tokens wait in `pending` until a whole block is there, so that the sums do not depend on how
    the scheduler cuts the text into batches. `rows` keeps the first tokens for the CKA measures.
    """

    def __init__(
        self, experts: Experts, spec: CollectionSpec, *, layers: int = 1, at_once: int = 1
    ) -> None:
        """layers: of the profile to be. at_once: those whose sums are in memory together."""
        self.experts = experts
        self.spec = spec
        self.layers = layers
        self.at_once = at_once
        self.num_experts = experts.num_experts
        self.device = experts.device
        self.moments = Moments(
            self.num_experts,
            measures=spec.measures,
            weighting=spec.weighting,
            device=self.device,
        )
        self.rank_counts = torch.zeros(0, self.num_experts, dtype=torch.int64, device=self.device)
        self.rank_energy = self.rank_counts[:, 0]  # squared routing weight by rank, in 2^-32
        self.pending: list[torch.Tensor] = []  # [n, H]
        self.pending_routed: list[torch.Tensor] = []  # bool [n, E]
        self.rows: list[torch.Tensor] = []  # [n, H]
        self.cka: dict[str, torch.Tensor] = {}
        self.fitted: dict[str, torch.Tensor] = {}  # tables of surrogates and rules
        self._surrogate_sums: SurrogateSums | None = None  # they are large: only once there are any
        self.stream = StreamEnergy(self.device)
        self.sample = TokenSample(
            sample_tokens(spec.memory, *self._sizes[:2], at_once),
            None if spec.surrogates is None else spec.surrogates.sequence,
        )
        self.tokens_seen = 0

    def check(self) -> None:
        """Raise `SereError` for a spec that this layer cannot have, before anything runs."""
        _ = self.block, self._ranks

    @property
    def block(self) -> int:
        """Tokens per block. Raises `SereError` when the memory of the spec is too small."""
        return block_tokens(self.spec, *self._sizes, self.at_once)

    @property
    def _ranks(self) -> tuple[int, ...]:
        if self.spec.surrogates is None:
            return ()
        return evaluated_ranks(self.spec.surrogates, *self._sizes[:2], self.layers)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.num_experts, self.experts.hidden_size, self.experts.width

    def add(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> None:
        """rows: [n, H] the layer's input; ids, weights: [n, K] what its router chose; scores:
        [n, E] of all experts, None where it does not say."""
        ids = ids.to(torch.int64)
        self._count_ranks(ids, weights)
        routed = torch.zeros(len(rows), self.num_experts + 1, dtype=torch.bool, device=rows.device)
        known = (ids >= 0) & (ids < self.num_experts)
        routed.scatter_(1, torch.where(known, ids, self.num_experts), True)
        self.sample.add(self.tokens_seen, rows, ids.where(known, -1), weights, scores)
        self.pending.append(rows.clone())
        self.pending_routed.append(routed[:, : self.num_experts])
        missing = self.spec.cka_tokens - _count(self.rows)
        if self.spec.cka_measures and missing > 0:
            self.rows.append(self.pending[-1][:missing])
        self.tokens_seen += len(rows)
        block = self.block
        while _count(self.pending) >= block:
            waiting, routed = torch.cat(self.pending), torch.cat(self.pending_routed)
            self._consume(waiting[:block], routed[:block])
            self.pending, self.pending_routed = [waiting[block:]], [routed[block:]]

    def add_stream(self, rows: torch.Tensor) -> None:
        """rows: [n, H], the residual stream behind this layer."""
        if self.spec.surrogates is not None:
            self.stream.add(rows)

    def _count_ranks(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Popularity by rank among a token's slots: what a primary-k of S keeps is ranks < S."""
        if len(self.rank_counts) == 0:
            self.rank_counts = self.rank_counts.new_zeros(ids.shape[1], self.num_experts)
            self.rank_energy = self.rank_counts.new_zeros(ids.shape[1])
        order = weights.argsort(dim=1, descending=True, stable=True)
        ranked = ids.gather(1, order)
        known = ((ranked >= 0) & (ranked < self.num_experts)).to(torch.int64)
        self.rank_counts.scatter_add_(1, (ranked * known).T, known.T)
        # Whole numbers: the sum must not depend on how the text was cut into batches.
        energy = (weights.gather(1, order).double() ** 2 * 2**32).to(torch.int64)
        self.rank_energy += (energy * known).sum(dim=0)

    def finish(self) -> None:
        """Add what still waits, and compute the CKA measures over the kept rows."""
        if _count(self.pending):
            self._consume(torch.cat(self.pending), torch.cat(self.pending_routed))
        self.pending, self.pending_routed = [], []
        if self.spec.cka_measures and not self.cka:
            rows = torch.cat(self.rows)
            block = cka_block(self.spec, *self._sizes)
            self.cka = cka_matrix(self.experts.outputs, rows, self.spec.cka_measures, block=block)
            self.rows = []
        if self.spec.surrogates is not None and "surrogate_bias" not in self.fitted:
            self.fitted = fit_surrogates(
                self._sums_of_surrogates(self.spec.surrogates),
                self._ranks,
                self.spec.surrogates.rank,
                self.experts.expert_bytes,
            )
            self._surrogate_sums = None
        if "error_similarity" not in self.fitted:
            self.fitted |= fit_rules(
                self.sample,
                self.experts.outputs,
                self.block,
                self.leading_similarity(),
                self._surrogates(),
            )
            self.sample.parts = {}

    def leading_similarity(self) -> torch.Tensor:
        """float32 [E, E], once everything is collected."""
        first = self.spec.measures[0]
        return similarity(self.moments, first) if first in MOMENT_MEASURES else self.cka[first]

    def _surrogates(self) -> Surrogates | None:
        if "surrogate_bias" not in self.fitted:
            return None
        bias = self.fitted["surrogate_bias"]
        none = bias.new_zeros(bias.shape[0], 0, bias.shape[1])
        inward, outward = (self.fitted.get(f"surrogate_{way}", none) for way in ("in", "out"))
        return inward, outward, bias

    def _sums_of_surrogates(self, spec: SurrogateSpec) -> SurrogateSums:
        if self._surrogate_sums is None:
            hidden = self.experts.hidden_size
            self._surrogate_sums = SurrogateSums(
                self.num_experts, hidden, spec.sequence, self.device
            )
        return self._surrogate_sums

    def _consume(self, rows: torch.Tensor, routed: torch.Tensor) -> None:
        outputs = self.experts.outputs(rows)
        if not outputs.isfinite().all():
            raise SereError(
                f"MoE layer {self.experts.layer_id}: an expert's output is infinite or NaN on the "
                "calibration text; try another data type through SGLang: -- --dtype bfloat16"
            )
        if self.spec.surrogates is not None:
            sums = self._sums_of_surrogates(self.spec.surrogates)
            sums.update(rows, outputs, routed, self.moments.num_tokens)
        self.moments.update(outputs, routed)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything `restore` needs to go on bit for bit."""
        kept = {
            **self.moments.sums,
            "rank_counts": self.rank_counts,
            "rank_energy": self.rank_energy,
            **self.stream.sums,
        }
        for name in ("pending", "pending_routed", "rows"):
            parts = getattr(self, name)
            if _count(parts):
                kept[name] = torch.cat(parts)
        kept |= {f"cka.{name}": matrix for name, matrix in self.cka.items()}
        kept |= {f"{FITTED}{name}": table for name, table in self.fitted.items()}
        kept |= {f"{_SAMPLE}{name}": part for name, part in self.sample.parts.items()}
        if self._surrogate_sums is not None:
            kept |= {f"{_SUMS}{name}": t for name, t in self._surrogate_sums.sums.items()}
        return kept

    def restore(self, kept: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self.moments.sums.items():
            tensor.copy_(kept[name])
        self.rank_counts = kept["rank_counts"].to(self.device)
        self.rank_energy = kept["rank_energy"].to(self.device)
        self.stream.restore(kept)
        for name in ("pending", "pending_routed", "rows"):
            setattr(self, name, [kept[name].to(self.device)] if name in kept else [])
        self.cka = _below("cka.", kept)
        self.fitted = _below(FITTED, kept)
        sample = _below(_SAMPLE, kept)
        self.sample.restore({name: part.to(self.device) for name, part in sample.items()})
        sums = _below(_SUMS, kept)
        if sums and self.spec.surrogates is not None:
            for name, tensor in self._sums_of_surrogates(self.spec.surrogates).sums.items():
                tensor.copy_(sums[name])
        self.tokens_seen = self.moments.num_tokens + _count(self.pending)


def explained(error: Exception, spec: CollectionSpec, advice: str) -> str:
    """One line for the user; out of memory names the flag that lowers it, and `advice`."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if is_out_of_memory(error):
        return (
            f"out of memory while running all experts ({text}); lower --memory "
            f"(now {spec.memory >> 20}MiB), or {advice}"
        )
    return f"{type(error).__name__}: {text}"


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(
        error
    )


def _below(prefix: str, kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in kept.items() if n.startswith(prefix)}


def _count(parts: list[torch.Tensor]) -> int:
    return sum(map(len, parts))
