"""Calibration inside one rank: run every expert of each MoE layer on the layer's own input.

Nothing here knows a model or a quantization. All experts' outputs for a block of tokens come
from one call of the layer's own runner: the block is repeated once per expert, each copy routed
to that expert alone with weight 1. Then the layer runs as if nobody had looked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sere_sglang.backend.bind import _moe_layers, _require_standard_format, _routers
from sere_sglang.errors import SereError
from sere_sglang.profile.cka import cka_matrix
from sere_sglang.profile.collection import (
    CollectionSpec,
    block_tokens,
    cka_block,
    load_partial,
    save_partial,
)
from sere_sglang.profile.measures import Moments


class LayerCollector:
    """One MoE layer's running statistics.

    Tokens wait in `pending` until a whole block is there, so that the sums do not depend on how
    the scheduler cuts the text into batches. `rows` keeps the first tokens for the CKA measures.
    """

    def __init__(self, layer: Any, spec: CollectionSpec) -> None:
        self.layer = layer
        self.spec = spec
        self.num_experts = int(layer.num_experts - layer.num_fused_shared_experts)
        self.device = next(layer.parameters()).device
        self.moments = Moments(
            self.num_experts,
            measures=spec.measures,
            weighting=spec.weighting,
            device=self.device,
        )
        self.rank_counts = torch.zeros(0, self.num_experts, dtype=torch.int64, device=self.device)
        self.pending: list[torch.Tensor] = []  # [n, H]
        self.pending_routed: list[torch.Tensor] = []  # bool [n, E]
        self.rows: list[torch.Tensor] = []  # [n, H]
        self.cka: dict[str, torch.Tensor] = {}
        self.tokens_seen = 0

    @property
    def block(self) -> int:
        """Tokens per block. Raises `SereError` when the memory of the spec is too small."""
        return block_tokens(self.spec, *self._sizes)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        width = int(self.layer.moe_runner_config.intermediate_size_per_partition or 0)
        return self.num_experts, int(self.layer.hidden_size), width

    def add(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """rows: [n, H] the layer's input; ids, weights: [n, K] what its router chose."""
        ids = ids.to(torch.int64)
        self._count_ranks(ids, weights)
        routed = torch.zeros(len(rows), self.num_experts + 1, dtype=torch.bool, device=rows.device)
        known = (ids >= 0) & (ids < self.num_experts)
        routed.scatter_(1, torch.where(known, ids, self.num_experts), True)
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

    def _count_ranks(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Popularity by rank among a token's slots: what a primary-k of S keeps is ranks < S."""
        if len(self.rank_counts) == 0:
            self.rank_counts = self.rank_counts.new_zeros(ids.shape[1], self.num_experts)
        ranked = ids.gather(1, weights.argsort(dim=1, descending=True, stable=True))
        known = ((ranked >= 0) & (ranked < self.num_experts)).to(torch.int64)
        self.rank_counts.scatter_add_(1, (ranked * known).T, known.T)

    def finish(self) -> None:
        """Add what still waits, and compute the CKA measures over the kept rows."""
        if _count(self.pending):
            self._consume(torch.cat(self.pending), torch.cat(self.pending_routed))
        self.pending, self.pending_routed = [], []
        if self.spec.cka_measures and not self.cka:
            rows = torch.cat(self.rows)
            block = cka_block(self.spec, *self._sizes)
            self.cka = cka_matrix(self.outputs, rows, self.spec.cka_measures, block=block)
            self.rows = []

    def _consume(self, rows: torch.Tensor, routed: torch.Tensor) -> None:
        outputs = self.outputs(rows)
        if not outputs.isfinite().all():
            raise SereError(
                f"MoE layer {self.layer.layer_id}: an expert's output is infinite or NaN on the "
                "calibration text; try another data type, for instance '-- --dtype bfloat16'"
            )
        self.moments.update(outputs, routed)

    @torch.no_grad()
    def outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """[E, n, H] in the layer's dtype: every expert's output for `rows` [n, H]."""
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        count = len(rows)
        repeated = rows.repeat(self.num_experts, 1)  # some runners write in place
        ids = torch.arange(self.num_experts, dtype=torch.int32, device=rows.device)
        ids = ids.repeat_interleave(count)[:, None]
        weights = torch.ones(ids.shape, dtype=torch.float32, device=rows.device)
        logits = torch.zeros(len(ids), self.num_experts, dtype=rows.dtype, device=rows.device)
        chosen = StandardTopKOutput(weights, ids, logits)
        outputs = self.layer.forward_impl(repeated, chosen)
        if not self.layer.reduce_results and _ranks(self.layer) > 1:
            from sglang.srt.distributed.communication_op import tensor_model_parallel_all_reduce

            outputs = tensor_model_parallel_all_reduce(outputs)
        return outputs.view(self.num_experts, count, -1)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything `restore` needs to go on bit for bit."""
        kept = {**self.moments.sums, "rank_counts": self.rank_counts}
        for name in ("pending", "pending_routed", "rows"):
            parts = getattr(self, name)
            if _count(parts):
                kept[name] = torch.cat(parts)
        return kept | {f"cka.{name}": matrix for name, matrix in self.cka.items()}

    def restore(self, kept: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self.moments.sums.items():
            tensor.copy_(kept[name])
        self.rank_counts = kept["rank_counts"].to(self.device)
        for name in ("pending", "pending_routed", "rows"):
            setattr(self, name, [kept[name].to(self.device)] if name in kept else [])
        self.cka = {n.removeprefix("cka."): t for n, t in kept.items() if n.startswith("cka.")}
        self.tokens_seen = self.moments.num_tokens + _count(self.pending)


class Collector:
    """One per rank. `collect` is called before every MoE layer runs; `call` is the remote end.

    A failure inside the scheduler would kill the whole engine, so it is kept for the next `call`.
    """

    def __init__(self, spec: CollectionSpec) -> None:
        self.spec = spec
        self.layers: dict[int, LayerCollector] = {}
        self.armed = False
        self.num_valid = 0
        self.error: Exception | None = None
        self.is_writer = True

    def attach(self, model: torch.nn.Module, *, is_writer: bool = True) -> None:
        """Find the MoE layers of `model`; a model that SERE cannot serve is a kept failure."""
        self.is_writer = is_writer
        try:
            self._attach(model)
        except Exception as error:
            self.error = error

    def _attach(self, model: torch.nn.Module) -> None:
        name = type(model).__name__
        layers, routers = _moe_layers(model), _routers(model)
        if not layers:
            raise SereError(f"--model: {name} has no MoE layers, there is nothing to calibrate")
        missing = sorted(set(layers) - set(routers))
        if missing:
            raise SereError(
                f"--model: {name} routes inside its own code in MoE layer(s) {missing}, so SERE "
                "cannot re-route it and a calibration would be of no use"
            )
        for layer_id in sorted(layers):
            _require_standard_format(routers[layer_id], name)
            self.layers[layer_id] = LayerCollector(layers[layer_id], self.spec)

    def begin_forward(self, num_tokens: int, *, is_prefill: bool) -> None:
        """Called before each forward of the target model, with its tokens before padding."""
        self.num_valid = num_tokens if is_prefill else 0

    def collect(self, layer: Any, hidden: torch.Tensor, topk_output: Any) -> None:
        """Fold one forward's rows of `layer` in."""
        if not self.armed or not self.num_valid or self.error is not None:
            return
        collector = self.layers.get(getattr(layer, "layer_id", -1))
        if collector is None or collector.layer is not layer:
            return
        try:
            valid = slice(self.num_valid)
            slots = topk_output.topk_ids[valid], topk_output.topk_weights[valid]
            collector.add(hidden[valid], *slots)
        except Exception as error:
            self.error = error

    def call(self, action: str, **arguments: Any) -> None:
        """begin, check, finish(layer), save(path, about), restore(path). Raises `SereError`."""
        try:
            if self.error is not None:
                raise self.error
            self._call(action, **arguments)
        except SereError:
            raise
        except Exception as error:
            raise SereError(_explained(error, self.spec)) from error

    def _call(self, action: str, **arguments: Any) -> None:
        if action == "begin":
            for collector in self.layers.values():
                _ = collector.block
            self.armed = True
        elif action == "check":
            self._check_all_ran()
        elif action == "finish":
            self.layers[arguments["layer"]].finish()
        elif action == "save":
            if self.is_writer:
                save_partial(arguments["path"], self.state(), arguments["about"])
        elif action == "restore":
            self.restore(load_partial(arguments["path"])[0])
        else:
            raise ValueError(f"unknown action {action!r}")

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{layer_id}/{name}": tensor
            for layer_id, collector in self.layers.items()
            for name, tensor in collector.state().items()
        }

    def restore(self, kept: Mapping[str, torch.Tensor]) -> None:
        for layer_id, collector in self.layers.items():
            prefix = f"{layer_id}/"
            own = {n.removeprefix(prefix): t for n, t in kept.items() if n.startswith(prefix)}
            collector.restore(own)

    def _check_all_ran(self) -> None:
        silent = [i for i, collector in self.layers.items() if collector.tokens_seen == 0]
        if silent:
            raise SereError(
                f"--model: MoE layer(s) {silent} ran without SGLang's standard expert layer, so "
                "their experts cannot be observed; SERE does not support this model"
            )


def _count(parts: list[torch.Tensor]) -> int:
    return sum(map(len, parts))


def _ranks(layer: Any) -> int:
    return int(layer.moe_tp_size) * int(layer.moe_ep_size)


def _explained(error: Exception, spec: CollectionSpec) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text:
        return (
            f"out of memory while running all experts ({text}); lower --memory "
            f"(now {spec.memory >> 20}MiB), or leave SGLang less: -- --mem-fraction-static 0.6"
        )
    return f"{type(error).__name__}: {text}"
