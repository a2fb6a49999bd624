"""Calibration inside one rank: run every expert of each MoE layer on the layer's own input.

Nothing here knows a model or a quantization. All experts' outputs for a block of tokens come
from one call of the layer's own runner: the block is repeated once per expert, each copy routed
to that expert alone with weight 1. Then the layer runs as if nobody had looked.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sere_sglang.calibration.collection import CollectionSpec, load_partial, save_partial
from sere_sglang.calibration.statistics import LayerCollector, explained
from sere_sglang.errors import SereError
from sere_sglang.runtime.layer_shape import expert_weights
from sere_sglang.runtime.moe_layers import (
    decoder_layers,
    moe_layers,
    require_standard_format,
    routers_of,
)
from sere_sglang.runtime.rule_stage import scores_of
from sere_sglang.runtime.runners import require_any_ids


class LayerExperts:
    """The experts of one of SGLang's MoE layers."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.layer_id = int(layer.layer_id)
        self.num_experts = int(layer.num_experts - layer.num_fused_shared_experts)
        self.hidden_size = int(layer.hidden_size)
        self.width = int(layer.moe_runner_config.intermediate_size_per_partition or 0)
        self.device = next(layer.parameters()).device

    @property
    def expert_bytes(self) -> float:
        return expert_weights(self.layer)[0] * self.layer.moe_tp_size

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


class Collector:
    """One per rank. `collect` is called before every MoE layer runs; `call` is the remote end.

    A failure inside the scheduler would kill the whole engine, so it is kept for the next `call`.
    """

    def __init__(self, spec: CollectionSpec) -> None:
        self.spec = spec
        self.layers: dict[int, LayerCollector] = {}
        self._modules: dict[int, Any] = {}
        self._routers: dict[int, Any] = {}
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
        layers, routers = moe_layers(model), routers_of(model)
        if not layers:
            raise SereError(f"--model: {name} has no MoE layers, there is nothing to calibrate")
        missing = sorted(set(layers) - set(routers))
        if missing:
            raise SereError(
                f"--model: {name} routes inside its own code in MoE layer(s) {missing}, so SERE "
                "cannot re-route it and a calibration would be of no use"
            )
        self._modules, self._routers = layers, routers
        for layer_id in sorted(layers):
            require_standard_format(routers[layer_id], name, asked="--model")
            require_any_ids(layers[layer_id])
            experts = LayerExperts(layers[layer_id])
            self.layers[layer_id] = LayerCollector(
                experts, self.spec, layers=len(layers), at_once=len(layers)
            )
        if self.spec.surrogates is None:
            return
        for layer_id, block in decoder_layers(model, layers).items():
            see = functools.partial(self._see_stream, layer_id)
            block.register_forward_hook(see, with_kwargs=True)

    def begin_forward(self, num_tokens: int, *, is_prefill: bool) -> None:
        """Called before each forward of the target model, with its tokens before padding."""
        self.num_valid = num_tokens if is_prefill else 0

    def collect(self, layer: Any, hidden: torch.Tensor, topk_output: Any) -> None:
        """Fold one forward's rows of `layer` in."""
        if not self.armed or not self.num_valid or self.error is not None:
            return
        collector = self.layers.get(getattr(layer, "layer_id", -1))
        if collector is None or self._modules[layer.layer_id] is not layer:
            return
        try:
            valid = slice(self.num_valid)
            slots = topk_output.topk_ids[valid], topk_output.topk_weights[valid]
            router = self._routers[layer.layer_id].topk_config
            scores = scores_of(topk_output.router_logits, router, collector.num_experts)
            if scores is not None:
                scores = scores[valid] if len(scores) >= self.num_valid else None
            collector.add(hidden[valid], *slots, scores)
        except Exception as error:
            self.error = error

    def _see_stream(
        self, layer_id: int, _block: Any, inputs: Any, named: Mapping[str, Any], output: Any
    ) -> None:
        """Behind a decoder layer."""
        if not self.armed or not self.num_valid or self.error is not None:
            return
        collector, rows = self.layers[layer_id], self.num_valid
        size = collector.experts.hidden_size
        try:
            parts = _stream_parts((*inputs, *named.values()), output)
            # Others are sharded rows, or a block of another kind.
            if parts and all(p.dim() == 2 and p.shape[1] == size and len(p) >= rows for p in parts):
                collector.add_stream(torch.stack([p[:rows].float() for p in parts]).sum(0))
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
            advice = "leave SGLang less: -- --mem-fraction-static 0.6"
            raise SereError(explained(error, self.spec, advice)) from error

    def _call(self, action: str, **arguments: Any) -> None:
        if action == "begin":
            for collector in self.layers.values():
                collector.check()
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


def _stream_parts(inputs: Iterable[Any], output: Any) -> list[torch.Tensor]:
    """What adds up to the residual stream behind a decoder layer.

    Models on ``sglang.srt.layers.layer_boundary`` (0.5.23) leave the residual on the batch, others
    hand it on beside their output, or added up. Nothing where ranks still owe each other a sum.
    """
    stream = next((s for i in inputs if (s := getattr(i, "residual_stream", None))), None)
    if stream is not None:
        if stream.pending is None or stream.pending.owed is not None:
            return []
        output = (stream.pending.value, stream.residual)
    parts = output[:2] if isinstance(output, tuple) else (output,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _ranks(layer: Any) -> int:
    return int(layer.moe_tp_size) * int(layer.moe_ep_size)
