"""Seams in ``layers.moe.topk``: re-routing right after, or with, top-k.

``_post_process_topk_ids`` is called with keyword arguments right after top-k by every router that
emits standard top-k output: logical ids, before the routed-experts capture, logical-to-physical
mapping, padding masks, the recorder's view and token dispatch. SGLang offers no hook between the
two. ``fused_topk``, called with keyword arguments too, is the router of plain softmax models on a
GPU: there top-k and re-routing are one launch, and the stage behind it has nothing left to do.
A call that does not look like that is left to SGLang, and re-routed behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.patches.seam import hook, register
from sere_sglang.runtime.stage import RerouteStage, stage_of

_MODULE = "sglang.srt.layers.moe.topk"
_ROUTER = ("gating_output", "topk", "renormalize")  # what the fused form takes over

_selecting: RerouteStage | None = None  # of the select_experts call that is running


_OFFERED = f"{_MODULE}_transform.register_topk_transform"
"""What patches/upstream proposes to SGLang: the hook below without a private name."""


def install() -> None:
    if not register(_OFFERED, _transform, of=f"{_MODULE}._post_process_topk_ids"):
        hook(
            f"{_MODULE}._post_process_topk_ids",
            _reroute,
            HookType.BEFORE,
            needs=["topk_ids", "topk_weights", "topk_config", "layer_id"],
        )
    if _ids_are_simulated():
        return
    hook(f"{_MODULE}.select_experts", _select, HookType.AROUND, needs=["topk_config"])
    hook(f"{_MODULE}.fused_topk", _fused_topk, HookType.AROUND, needs=_ROUTER)


def _ids_are_simulated() -> bool:
    """SGLang then overwrites what ``fused_topk`` chose, so re-routing has to come after that."""
    return bool(
        envs.SGLANG_SIMULATE_UNIFORM_EXPERTS.get() or envs.SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS.get()
    )


def _transform(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    router_logits: torch.Tensor,
    topk_config: Any,
    **_context: Any,
) -> None:
    stage = stage_of(topk_config)
    if stage is not None:
        stage.run(topk_ids, topk_weights, router_logits, topk_config)


def _reroute(*args: Any, **kwargs: Any) -> None:
    config = kwargs["topk_config"] if "topk_config" in kwargs else args[2]
    stage = stage_of(config)
    if stage is not None:
        ids = kwargs["topk_ids"] if "topk_ids" in kwargs else args[0]
        weights = kwargs["topk_weights"] if "topk_weights" in kwargs else args[1]
        stage.run(ids, weights, kwargs.get("router_logits"), config)


def _select(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Says whose top-k ``fused_topk`` is about to compute; it is not told."""
    global _selecting
    stage = stage_of(kwargs["topk_config"] if "topk_config" in kwargs else args[2])
    # torch.compile traces neither the global nor what `finally` does; there the two stay apart.
    if stage is None or not stage.fuse or torch.compiler.is_compiling():
        return original(*args, **kwargs)
    _selecting = stage
    try:
        return original(*args, **kwargs)
    finally:
        _selecting = stage.fused_ids = None


def _fused_topk(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    stage = _selecting
    if stage is None or not _is_plain_softmax(kwargs):
        return original(*args, **kwargs)
    logits, top_k, renormalize = (kwargs[name] for name in _ROUTER)
    if not stage.can_fuse(logits, top_k):
        return original(*args, **kwargs)
    return stage.run_fused(logits, renormalize)


def _is_plain_softmax(kwargs: dict[str, Any]) -> bool:
    """Whether these arguments of ``fused_topk`` ask for softmax, top-k and nothing else."""
    return (
        all(name in kwargs for name in _ROUTER)
        and kwargs.get("scoring_func", "softmax") == "softmax"
        and kwargs.get("correction_bias") is None
        and kwargs.get("packed_out") is None
        and kwargs.get("num_fused_shared_experts", 0) == 0
        and not kwargs.get("apply_routed_scaling_factor_on_output", False)
    )
