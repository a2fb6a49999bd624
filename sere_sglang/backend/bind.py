"""After the weights load: give every MoE layer of the target model its re-routing stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sere_sglang.backend.stage import RerouteStage, Switch, bind_stage
from sere_sglang.config import SereConfig
from sere_sglang.errors import SereError
from sere_sglang.ops import COUNTER_FIELDS, LayerTable, select_impl
from sere_sglang.profile import load_profile
from sere_sglang.schedule.control import ControlBlock


@dataclass
class Binding:
    """The stages of one rank's model and what they share. counters: int64 [layers, 6]."""

    model_name: str
    stages: list[RerouteStage]
    control: ControlBlock
    counters: torch.Tensor
    switch: Switch
    impl: str

    @property
    def layer_ids(self) -> list[int]:
        return [stage.layer_id for stage in self.stages]

    def check_all_ran(self) -> None:
        """After a forward: a layer that never reached the seam would be served without SERE."""
        silent = [stage.layer_id for stage in self.stages if stage.calls == 0]
        if silent:
            raise SereError(
                f"--moe-backend sere: MoE layer(s) {_ranges(silent)} of {self.model_name} ran "
                "without passing SGLang's standard top-k, so they cannot be re-routed; serve it "
                "without --moe-backend sere"
            )


def bind_model(model: torch.nn.Module, config: SereConfig, *, device: str) -> Binding:
    """Find the model's MoE layers and bind one stage to each. Raises `SereError`."""
    name = type(model).__name__
    layers = _moe_layers(model)
    routers = _routers(model)
    if not layers:
        raise SereError(f"--moe-backend sere: {name} has no MoE layers; drop the flag")
    unrouted = sorted(set(layers) - set(routers))
    if unrouted:
        raise SereError(
            f"--moe-backend sere: {name} builds its own top-k in MoE layer(s) "
            f"{_ranges(unrouted)} instead of SGLang's TopK, so they cannot be re-routed; "
            "serve it without --moe-backend sere"
        )
    assert config.sere_profile is not None
    profile = load_profile(config.sere_profile)
    missing = sorted(set(layers) - set(profile.similarity))
    if missing:
        raise SereError(
            f"--sere-profile {config.sere_profile}: no similarity for MoE layer(s) "
            f"{_ranges(missing)} of {name}; calibrate this model again"
        )
    target = torch.device(device)
    impl = select_impl(target, strict=target.type == "cuda" and config.sere_on_error != "fallback")
    control = ControlBlock(target)
    counters = torch.zeros(len(layers), len(COUNTER_FIELDS), dtype=torch.int64, device=target)
    switch = Switch()
    stages = []
    for row, layer_id in enumerate(sorted(layers)):
        router = routers[layer_id]
        _require_standard_format(router, name)
        topk_config = router.topk_config
        stage = RerouteStage(
            layer_id=layer_id,
            top_k=topk_config.top_k - topk_config.num_shared_topk_slots,
            table=LayerTable.build(profile.similarity[layer_id], device=target),
            control=control.words,
            counters=counters[row],
            switch=switch,
            impl=impl,
        )
        # Written by the router from its own ids; it would go stale behind re-routing.
        topk_config.fused_gate_packed_ids = False
        bind_stage(topk_config, stage)
        stages.append(stage)
    return Binding(name, stages, control, counters, switch, impl)


def _moe_layers(model: torch.nn.Module) -> dict[int, Any]:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    return {
        module.layer_id: module
        for module in model.modules()
        if isinstance(module, FusedMoE) and not module.is_shared_fused_moe
    }


def _routers(model: torch.nn.Module) -> dict[int, Any]:
    from sglang.srt.layers.moe.topk import TopK

    return {
        module.layer_id: module
        for module in model.modules()
        if isinstance(module, TopK) and not module.is_draft
    }


def _require_standard_format(router: Any, model_name: str) -> None:
    from sglang.srt.layers.moe.topk import TopKOutputFormat

    topk_config = router.topk_config
    if topk_config.output_format not in (None, TopKOutputFormat.STANDARD):
        backend = topk_config.runner_backend
        raise SereError(
            f"--moe-backend sere: {model_name} runs --moe-runner-backend "
            f"{getattr(backend, 'value', backend)}, which routes inside its kernel "
            f"({topk_config.output_format.name.lower()}); choose another, for instance "
            "--moe-runner-backend triton or flashinfer_trtllm_routed"
        )


def _ranges(ids: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
