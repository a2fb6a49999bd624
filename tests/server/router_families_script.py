"""Run by test_router_families.py: what our stage makes of each of SGLang's routers, as JSON.

The routers are those of a GPU: SGLang's module is told that it is on one, and the Triton router
that it then launches runs in Triton's interpreter.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from sglang.kernels.ops.moe import moe_fused_gate
from sglang.srt.configs.shared_experts import SharedExpertsConfig
from sglang.srt.eplb import expert_location
from sglang.srt.eplb.eplb_algorithms import deepseek
from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo
from sglang.srt.layers.moe import topk as sglang_topk
from sglang.srt.layers.moe.topk import TopKConfig
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.models.cohere2_moe import cohere2_sigmoid_topk
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from benchmarks._common import random_similarity
from sere_sglang.ops import LayerTable, encode_control, new_counters, reroute_
from sere_sglang.patches import topk
from sere_sglang.runtime.rule_stage import scores_of
from sere_sglang.runtime.stage import RerouteStage, Switch, bind_stage

T, E, K, VALID = 24, 32, 4, 21
PHYSICAL, RANKS = 40, 4
BIAS = 0.3 * torch.randn(E, generator=torch.Generator().manual_seed(3))
GROUPS: dict[str, Any] = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}
SCALED: dict[str, Any] = {
    "routed_scaling_factor": 2.5,
    "apply_routed_scaling_factor_on_output": True,
}
ONE_SHARED: dict[str, Any] = {
    "top_k": K + 1,
    "shared_experts": SharedExpertsConfig(num_fused_shared_experts=1),
    "routed_scaling_factor": 2.5,
}
TRTLLM: dict[str, Any] = {"runner_backend": MoeRunnerBackend.FLASHINFER_TRTLLM_ROUTED}

FAMILIES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, not renormalized": {"renormalize": False},
    "softmax, scaled": SCALED,
    "softmax, in torch": {"torch_native": True},
    "softmax, for flashinfer_trtllm_routed": TRTLLM,
    "sigmoid, biased": {"scoring_func": "sigmoid", "correction_bias": BIAS},
    "sigmoid, biased, scaled": {"scoring_func": "sigmoid", "correction_bias": BIAS, **SCALED},
    "sigmoid, biased, a shared expert": {
        "scoring_func": "sigmoid", "correction_bias": BIAS, **ONE_SHARED,
    },
    "sqrtsoftplus, biased": {"scoring_func": "sqrtsoftplus", "correction_bias": BIAS},
    "grouped softmax": GROUPS,
    "grouped softmax, not renormalized, scaled": {"renormalize": False, **GROUPS, **SCALED},
    "grouped softmax, a shared expert": {**GROUPS, **ONE_SHARED},
    "grouped sigmoid": {"scoring_func": "sigmoid", **GROUPS},
    "grouped, biased": {"scoring_func": "sigmoid", "correction_bias": BIAS, **GROUPS},
    "grouped, biased, scaled": {
        "scoring_func": "sigmoid", "correction_bias": BIAS, **GROUPS, **SCALED,
    },
    "grouped, biased, a shared expert": {
        "scoring_func": "sigmoid", "correction_bias": BIAS, **GROUPS, **ONE_SHARED,
    },
    "one group, biased": {
        "scoring_func": "sigmoid", "correction_bias": BIAS,
        "use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1,
    },
    "a bias of each row": {"scoring_func": "sigmoid"},
    "a function of the model": {
        "scoring_func": "sigmoid", "renormalize": False,
        "custom_routing_function": cohere2_sigmoid_topk,
    },
}  # fmt: skip


class Watched(RerouteStage):
    """Keeps what it was handed."""

    def run(self, topk_ids: Any, topk_weights: Any, logits: Any = None, config: Any = None) -> None:
        self.seen = (topk_ids.clone(), topk_weights.clone(), logits, config)
        super().run(topk_ids, topk_weights, logits, config)


def stage_for(config: TopKConfig) -> Watched:
    made = Watched(
        layer_id=0,
        top_k=config.top_k - config.num_shared_topk_slots,
        table=LayerTable.build(random_similarity(E, torch.Generator().manual_seed(1))),
        control=encode_control(enabled=True, num_valid=VALID, classes=[(1, 0.2)]),
        row_class=torch.zeros(64, dtype=torch.uint8),
        counters=new_counters(1)[0],
        switch=Switch(),
    )
    bind_stage(config, made)
    return made


def choose(config: TopKConfig, name: str, info: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and weights ``[T, K (+ 1)]``."""
    made = torch.Generator().manual_seed(2)
    hidden, logits = torch.randn(T, 8, generator=made), torch.randn(T, E, generator=made)
    per_row = BIAS + 0.1 * torch.randn(T, E, generator=made)
    chosen = sglang_topk.select_experts(
        hidden,
        logits,
        config,
        layer_id=0,
        expert_location_dispatch_info=info,
        dynamic_expert_bias=per_row if name == "a bias of each row" else None,
    )
    return chosen.topk_ids, chosen.topk_weights


def rerouted(
    ids: torch.Tensor, weights: torch.Tensor, stage: Watched
) -> tuple[torch.Tensor, torch.Tensor]:
    """What re-routing makes of a router's slots; shared ones, behind the others, stay."""
    ids, weights = ids.to(torch.int32).clone(), weights.float().clone()
    routed = slice(stage.top_k)
    reroute_(ids[:, routed], weights[:, routed], stage.table, stage.control, impl="torch")
    return ids, weights


def family(name: str) -> dict[str, Any]:
    config = TopKConfig(**{"top_k": K, **FAMILIES[name]})
    plain = choose(replace(config), name)
    stage = stage_for(config)
    out = choose(config, name)
    ids, weights, logits, told = stage.seen
    scores = scores_of(logits, told, E)
    routed = ids[:, : stage.top_k].long()
    factors = None if scores is None else weights[:, : stage.top_k] / scores.gather(1, routed)
    return {
        "plain": [part.tolist() for part in plain],
        "seen": [ids.tolist(), weights.tolist()],
        "wanted": [part.tolist() for part in rerouted(*plain, stage)],
        "out": [part.tolist() for part in out],
        "factors": None if factors is None else factors.tolist(),
        "moved": int(stage.counters[4]),
    }


def placement(algorithm: str, *, rank_invariant: bool) -> tuple[Any, torch.Tensor]:
    """SGLang's own, of experts that are loaded unevenly: hot ones have two places."""
    load = torch.rand(1, E, generator=torch.Generator().manual_seed(5)) ** 4
    on_place = deepseek.rebalance_experts(load, PHYSICAL, None, 1, RANKS, False)[0]
    of_expert = expert_location._compute_logical_to_all_physical_map(on_place, E, RANKS, None)
    static = expert_location.compute_logical_to_rank_dispatch_physical_map(
        of_expert, RANKS, PHYSICAL, 1
    )
    info = ExpertLocationDispatchInfo(
        ep_dispatch_algorithm=algorithm,  # type: ignore[arg-type]
        partial_logical_to_rank_dispatch_physical_map=static[0],
        partial_logical_to_all_physical_map=of_expert[0],
        partial_logical_to_all_physical_map_num_valid=(of_expert[0] != -1).sum(-1),
        num_physical_experts=PHYSICAL,
        rank_invariant=rank_invariant,
    )
    return info, on_place[0]


def placed(name: str, algorithm: str, *, rank_invariant: bool = False) -> dict[str, Any]:
    """The same router where experts have been moved and doubled."""
    config = TopKConfig(**{"top_k": K, **FAMILIES[name]})
    plain = choose(replace(config), name)
    stage = stage_for(config)
    info, on_place = placement(algorithm, rank_invariant=rank_invariant)
    ids, weights = choose(config, name, info)
    wanted = rerouted(*plain, stage)
    return {
        "wanted": [part.tolist() for part in wanted],
        "physical": ids.tolist(),
        "weights": weights.tolist(),
        "on_place": on_place.tolist(),
    }


def shared_on_each_rank() -> dict[str, Any]:
    """DeepEP's numbering, in which every rank's experts are followed by its own shared one."""
    alone = TopKConfig(top_k=K, **FAMILIES["grouped, biased"], routed_scaling_factor=2.5)
    stage = stage_for(replace(alone))
    wanted = rerouted(*choose(alone, ""), stage)
    config = TopKConfig(**FAMILIES["grouped, biased, a shared expert"])
    stage = stage_for(config)
    sglang_topk.has_per_rank_fused_shared_slots = lambda shared: shared > 0
    with get_parallel().override(
        tp_size=RANKS, attn_tp_size=RANKS, moe_ep_size=RANKS, moe_ep_rank=1
    ):
        ids, weights = choose(config, "")
    return {
        "wanted": [part.tolist() for part in wanted],
        "ids": ids.tolist(),
        "weights": weights.tolist(),
        "handed": list(stage.seen[0].shape),
    }


def main() -> None:
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cpu"))
    sglang_topk._is_cpu, sglang_topk._is_cuda = False, True
    sglang_topk.fused_topk_deepseek = None  # FlashInfer's, CUDA alone
    moe_fused_gate.is_arch_support_pdl = lambda: False
    topk.install()
    both = ("softmax", "grouped, biased, a shared expert")
    out: dict[str, Any] = {
        "families": {name: family(name) for name in FAMILIES},
        "placed": {
            f"{name}, {algorithm}{', as every rank' * invariant}": placed(
                name, algorithm, rank_invariant=invariant
            )
            for name in both
            for algorithm, invariant in (("static", False), ("dynamic", False), ("dynamic", True))
        },
    }
    out["shared on each rank"] = shared_on_each_rank()
    print(json.dumps(out))


if __name__ == "__main__":
    main()
