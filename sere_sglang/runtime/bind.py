"""After the weights load: give every MoE layer of the target model its re-routing stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sere_sglang.errors import SereError
from sere_sglang.names import SIMILARITY
from sere_sglang.ops import COUNTER_FIELDS, LayerTable, select_impl
from sere_sglang.ops.fused import uses_cuda
from sere_sglang.options import SereConfig
from sere_sglang.profile import SereProfile
from sere_sglang.runtime.bind_rules import LayerRules, layer_rules, ranges, resolve_rules
from sere_sglang.runtime.control import ControlBlock
from sere_sglang.runtime.counters import FIELDS
from sere_sglang.runtime.moe_layers import (
    is_plain_softmax,
    moe_layers,
    require_probabilities,
    require_standard_format,
    require_weights_on_output,
    routed_top_k,
    routers_of,
)
from sere_sglang.runtime.runners import (
    dispatcher_name,
    needs_distinct,
    require_known,
    runner_of,
)
from sere_sglang.runtime.stage import RerouteStage, Switch, bind_stage
from sere_sglang.schedule.auto_rule import RuleChoice

# Rows that can be told apart by quality; decode batches are far smaller.
_MAX_CLASS_ROWS = 8192


@dataclass
class Binding:
    """The stages of one rank's model and what they share.

    counters: int64 [layers, 7] (`counters.FIELDS`). auto: the rule of that name. unavailable: rule
    -> why this model cannot be served under it here.
    """

    model_name: str
    stages: list[RerouteStage]
    control: ControlBlock
    counters: torch.Tensor
    switch: Switch
    impl: str
    auto: RuleChoice
    unavailable: Mapping[str, str] = field(default_factory=dict)

    @property
    def layer_ids(self) -> list[int]:
        return [stage.layer_id for stage in self.stages]

    @property
    def top_k(self) -> int:
        """Routed slots of a token."""
        return self.stages[0].top_k

    @property
    def num_experts(self) -> int:
        """Of the layer that has most."""
        return max(stage.table.num_experts for stage in self.stages)

    @property
    def has_surrogates(self) -> bool:
        """Some layer does."""
        rules = [stage.rules for stage in self.stages]
        return any(own is not None and own.surrogates is not None for own in rules)

    @property
    def loss_unit(self) -> list[float]:
        """Of each layer, what losses are shares of; 1 where no rule can lose anything."""
        return [1.0 if s.rules is None else s.rules.loss_unit for s in self.stages]

    @contextmanager
    def capturing(self, *, launch: bool) -> Iterator[None]:
        """While a graph is captured. launch: it records the launches of the stages."""
        before = self.switch.launch
        self.switch.launch, self.switch.captures = launch, True
        try:
            yield
        finally:
            self.switch.launch, self.switch.captures = before, False

    def settle(self) -> None:
        """Before `counters` are read or zeroed between two steps: wait for the forwards under way.

        SGLang lets a forward wait for the scheduler's stream, never the reverse.
        """
        if self.counters.is_cuda:
            torch.cuda.synchronize(self.counters.device)

    def forget_runs(self) -> None:
        """From here on a stage counts as having run when it runs again."""
        for stage in self.stages:
            stage.ran = False

    @property
    def any_ran(self) -> bool:
        return any(stage.ran for stage in self.stages)

    def check_all_ran(self, where: str = "") -> None:
        """After a forward or a capture: a layer that did not reach the seam would be served without
        SERE. where: of which forwards, for the message."""
        silent = [stage.layer_id for stage in self.stages if not stage.ran]
        if silent:
            raise SereError(
                f"--moe-backend sere: MoE layer(s) {ranges(silent)} of {self.model_name} ran "
                f"without passing SGLang's standard top-k{where}, so they cannot be re-routed; "
                "serve it without --moe-backend sere"
            )
        waiting = [
            s.layer_id for s in self.stages if s.rules is not None and s.rules.lost is not None
        ]
        if waiting:
            raise SereError(
                f"--sere-rule: MoE layer(s) {ranges(waiting)} of {self.model_name} ran without "
                "passing FusedMoE.forward, so surrogates cannot be added to their output; use a "
                "profile without surrogates"
            )


def bind_model(
    model: torch.nn.Module, profile: SereProfile, config: SereConfig, *, device: str
) -> Binding:
    """Find the model's MoE layers and bind one stage to each. Raises `SereError`."""
    name = type(model).__name__
    layers, routers = moe_layers(model), routers_of(model)
    _require_routable(name, layers, routers, profile, config)
    target = torch.device(device)
    strict = target.type == "cuda" and not config.falls_back
    impl = select_impl(target, strict=strict)
    configs = {i: routers[i].topk_config for i in sorted(layers)}
    auto, rule, unavailable = resolve_rules(target.type, config, layers, configs, profile)
    if rule in unavailable:
        raise SereError(f"--sere-rule {rule}: rule {rule} cannot be had: {unavailable[rule]}")
    rules: dict[int, LayerRules] = {}
    if target.type == "cpu" or rule not in {SIMILARITY, *unavailable}:
        shares = profile.loss_shares
        rules = {i: layer_rules(layers[i], configs[i], profile, target, shares[i]) for i in configs}
    words = {i: own.words for i, own in rules.items()}
    on_host = target.type == "cpu" or not words
    control = ControlBlock(target, sorted(layers), _MAX_CLASS_ROWS, None if on_host else words)
    counters = torch.zeros(len(layers), len(FIELDS), dtype=torch.int64, device=target)
    switch = Switch()
    softmax_routers = [id for id in layers if is_plain_softmax(routers[id].topk_config)]
    # Built now: at its first use SGLang may be capturing a graph.
    fuses = impl == "cuda" and bool(softmax_routers) and not rules and uses_cuda(strict)
    for layer_id in layers:  # all of them before any is changed
        router = routers[layer_id]
        require_standard_format(router, name)
        require_weights_on_output(layers[layer_id], name)
        if target.type != "cpu":
            require_probabilities(router, runner_of(layers[layer_id]), name)
    stages = []
    for row, layer_id in enumerate(sorted(layers)):
        layer, router = layers[layer_id], routers[layer_id]
        scale = profile.tables[layer_id]["scale"] if config.sere_scale else None
        stage = RerouteStage(
            layer_id=layer_id,
            top_k=routed_top_k(router),
            table=LayerTable.build(profile.similarity[layer_id], scale, device=target),
            control=control.words[row],
            row_class=control.row_class,
            counters=counters[row, : len(COUNTER_FIELDS)],
            switch=switch,
            impl=impl,
            fuse=fuses and layer_id in softmax_routers,
            distinct=target.type == "cpu" or _distinct(layer, config),
        )
        if layer_id in rules:
            own = rules[layer_id]
            stage.rules = (
                own.on_host(counters[row])
                if control.rule_words is None
                else own.in_graphs(control.rule_words[row], counters[row])
            )
        # Written by the router from its own ids; it would go stale behind re-routing.
        router.topk_config.fused_gate_packed_ids = False
        bind_stage(router.topk_config, stage)
        bind_stage(layer, stage)
        stages.append(stage)
    return Binding(name, stages, control, counters, switch, impl, auto, unavailable)


def _require_routable(
    name: str,
    layers: Mapping[int, Any],
    routers: Mapping[int, Any],
    profile: SereProfile,
    config: SereConfig,
) -> None:
    """Raise `SereError` where a model `name` has no MoE layers, or not all of them can be
    re-routed."""
    if not layers:
        raise SereError(
            f"--moe-backend sere: {name} has no MoE layers here; drop the flag, or, where a "
            "pipeline stage has none, choose another --pp-size"
        )
    unrouted = sorted(set(layers) - set(routers))
    if unrouted:
        raise SereError(
            f"--moe-backend sere: {name} builds its own top-k in MoE layer(s) "
            f"{ranges(unrouted)} instead of SGLang's TopK, so they cannot be re-routed; "
            "serve it without --moe-backend sere"
        )
    missing = sorted(set(layers) - set(profile.similarity))
    if missing:
        raise SereError(
            f"--sere-profile {config.sere_profile}: no similarity for MoE layer(s) "
            f"{ranges(missing)} of {name}; calibrate this model again"
        )


def _distinct(layer: Any, config: SereConfig) -> bool:
    """Whether a layer's rows must hold K different experts. Raises `SereError` where that is not
    known and not allowed."""
    runner, dispatcher = runner_of(layer), dispatcher_name()
    allowed = bool(config.sere_allow_untested)
    require_known(runner, dispatcher, allow_untested=allowed, instead="triton")
    return needs_distinct(runner, dispatcher)
