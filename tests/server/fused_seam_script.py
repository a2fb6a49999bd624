"""Run by test_fused_seam.py: prints what ``select_experts`` chose, as one JSON line."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from sglang.srt.layers.moe import topk as sglang_topk
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

import sere_sglang.runtime.stage as stage_module
from benchmarks._common import random_similarity
from sere_sglang.ops import LayerTable, encode_control, new_counters
from sere_sglang.patches import topk
from sere_sglang.runtime.stage import RerouteStage, Switch, bind_stage

T, E, K = 24, 32, 4

fused_launches = 0
_fused_topk_reroute = stage_module.fused_topk_reroute


def count_fused(*args: Any, **kwargs: Any) -> Any:
    global fused_launches
    fused_launches += 1
    return _fused_topk_reroute(*args, **kwargs)


def make_stage(fuse: bool) -> RerouteStage:
    return RerouteStage(
        layer_id=0,
        top_k=K,
        table=LayerTable.build(random_similarity(E, torch.Generator().manual_seed(1))),
        control=encode_control(enabled=True, num_valid=T - 3, classes=[(1, 0.2)]),
        row_class=torch.zeros(64, dtype=torch.uint8),
        counters=new_counters(1)[0],
        switch=Switch(),
        fuse=fuse,
    )


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(T, 8, generator=generator), torch.randn(T, E, generator=generator)


def select(
    stage: RerouteStage | None = None, run: Any = None, renormalize: bool = True, **config: Any
) -> dict[str, Any]:
    """One layer's choice; `run` stands for ``select_experts``, `config` for TopKConfig's rest."""
    hidden, logits = inputs()
    topk_config = sglang_topk.TopKConfig(top_k=K, renormalize=renormalize, **config)
    if stage is not None:
        bind_stage(topk_config, stage)
    before = fused_launches
    chosen = (run or sglang_topk.select_experts)(hidden, logits, topk_config, layer_id=0)
    found: dict[str, Any] = {
        "ids": chosen.topk_ids.tolist(),
        "weights": chosen.topk_weights.tolist(),
        "fused": fused_launches - before,
    }
    if stage is not None:
        found |= {"counters": stage.counters.tolist(), "ran": stage.ran}
    return found


def fail_once(stage: RerouteStage) -> bool:
    """A router that raises must not leave its stage behind for whoever calls ``fused_topk``."""
    hidden, logits = inputs()
    topk_config = sglang_topk.TopKConfig(top_k=K, scoring_func="no such function")
    bind_stage(topk_config, stage)
    try:
        sglang_topk.select_experts(hidden, logits, topk_config, layer_id=0)
    except Exception:
        sglang_topk.fused_topk(hidden_states=hidden, gating_output=logits, topk=K, renormalize=True)
        return True
    return False


def positional(stage: RerouteStage) -> dict[str, Any]:
    """A SGLang that hands ``fused_topk`` its arguments by position."""
    by_name = sglang_topk.fused_topk

    def by_position(
        hidden_states: Any, gating_output: Any, topk: Any, renormalize: Any, **_: Any
    ) -> Any:
        return by_name(hidden_states, gating_output, topk, renormalize)

    sglang_topk.fused_topk = by_position
    found = select(stage)
    sglang_topk.fused_topk = by_name
    return found


def main() -> None:
    # What SGLang binds where its AMX build of sgl_kernel is installed. Without one its CPU engine
    # takes another road, torch_native; a GPU server takes this one.
    sglang_topk.fused_topk = sglang_topk.fused_topk_cpu
    stage_module.fused_topk_reroute = count_fused
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cpu"))
    out: dict[str, Any] = {"plain": select()}
    topk.install()
    if "simulate" in sys.argv:
        out = {"apart": select(make_stage(False)), "fused": select(make_stage(True))}
        print(json.dumps(out))
        return

    for renormalize in (True, False):
        out[str(renormalize)] = {
            "apart": select(make_stage(False), renormalize=renormalize),
            "fused": select(make_stage(True), renormalize=renormalize),
        }
    scaled: dict[str, Any] = {
        "routed_scaling_factor": 2.5,
        "apply_routed_scaling_factor_on_output": True,
    }
    out["scaled"] = {
        "apart": select(make_stage(False), **scaled),
        "fused": select(make_stage(True), **scaled),
    }
    out["no stage"] = select()
    off = make_stage(True)
    off.switch.launch = False
    out["off"] = select(off)
    out["grouped"] = select(
        make_stage(True), use_grouped_topk=True, topk_group=2, num_expert_group=4
    )
    out["biased"] = select(make_stage(True), correction_bias=torch.zeros(E))
    out["positional"] = positional(make_stage(True))
    before, raised = fused_launches, fail_once(make_stage(True))
    out["after an error"] = {"raised": raised, "fused": fused_launches - before}
    compiled = torch.compile(sglang_topk.select_experts, backend="eager", dynamic=True)
    out["compiled"] = select(make_stage(True), run=compiled)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
