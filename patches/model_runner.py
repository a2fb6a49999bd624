"""Seam: ``ModelRunner.load_model`` and ``ModelRunner.forward``.

The first has the weights and no CUDA graph yet; the second sees every forward of a rank,
graph or eager, before it runs and before padding. Draft models are left alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.config import quality_rules
from sere_sglang.errors import SereError
from sere_sglang.options import SereConfig
from sere_sglang.patches import moe_rows
from sere_sglang.patches.forward_batch import noted
from sere_sglang.patches.seam import hook
from sere_sglang.profile import SereProfile, load_profile
from sere_sglang.runtime import process
from sere_sglang.runtime.bind import Binding, bind_model
from sere_sglang.runtime.moe_layers import moe_layers
from sere_sglang.runtime.probe import moe_cost
from sere_sglang.runtime.rank import SereRuntime
from sere_sglang.schedule.composition import BatchComposition, Mode, MoeRows
from sere_sglang.schedule.cost import MoeCost
from sere_sglang.schedule.cost_file import load_cost

_TARGET = "sglang.srt.model_executor.model_runner.ModelRunner"

_MODES: dict[str, Mode] = {
    "DECODE": "decode",
    "TARGET_VERIFY": "verify",
    "MIXED": "mixed",
    "IDLE": "idle",
}


def install() -> None:
    hook(f"{_TARGET}.load_model", _bind, HookType.AFTER)
    hook(
        f"{_TARGET}.forward",
        _forward,
        HookType.AROUND,
        needs=["forward_batch"],
        runs="always",
        otherwise=_forward_exact,
    )


def _bind(_result: Any, runner: Any) -> None:
    asked = process.asked()
    if asked is None or runner.is_draft_worker:
        return
    # Found or made before any worker started (`preflight.prepare`).
    profile = load_profile(str(asked.sere_profile))
    binding = _binding(runner, profile, asked)
    if isinstance(binding, str):
        process.serve_without(binding)
        return
    cost = _cost(runner, binding, asked.sere_cost).covering(profile.similarity)
    process.start(SereRuntime(asked, binding, profile, cost, moe_rows.moe_rows()))


def _binding(runner: Any, profile: SereProfile, asked: SereConfig) -> Binding | str:
    """Why not, where the model cannot be bound, on whichever rank, and is to be served all the
    same."""
    from sglang.srt.runtime_context import get_parallel

    binding: Binding | str
    try:
        moe_rows.require_no_quality(quality_rules(asked).allowed)
        binding = bind_model(runner.model, profile, asked, device=runner.device)
    except SereError as error:
        if not asked.falls_back:
            raise
        binding = str(error)
    if not asked.falls_back:
        return binding
    own = binding if isinstance(binding, str) else None
    reasons = get_parallel().world_group.all_gather_object(own)
    told: str | None = next((reason for reason in reasons if reason is not None), None)
    return binding if told is None else told


def _cost(runner: Any, binding: Binding, file: str | None) -> MoeCost:
    """From the file, or timed: of this rank's layers, by the first rank."""
    from sglang.srt.runtime_context import get_parallel

    if file is not None:
        return load_cost(file).cost
    top_k = {stage.layer_id: stage.top_k for stage in binding.stages}
    cost = time_layers(runner, top_k)
    # Measured, so it differs between ranks, which must decide alike.
    shared: MoeCost = get_parallel().world_group.broadcast_object(cost, src=0)
    return shared


def time_layers(runner: Any, top_k: Mapping[int, int]) -> MoeCost:
    """What the MoE layers of this rank cost. `top_k`: layer id -> routed experts per token."""
    from sglang.srt.runtime_context import get_parallel

    return moe_cost(
        moe_layers(runner.model),
        top_k,
        device=torch.device(runner.device),
        warns=get_parallel().world_group.rank_in_group == 0,
        deferred_weights=runner.startup_weight_load is not None,
    )


def _forward(
    original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    active = process.current()
    if active is None or runner.is_draft_worker:
        return original(runner, forward_batch, *args, **kwargs)
    if active.health.failed is not None:
        return _forward_exact(original, runner, forward_batch, *args, **kwargs)
    from sglang.srt.runtime_context import get_parallel

    composition = composition_of(forward_batch, active.moe_rows, get_parallel())
    graph = runner.decode_cuda_graph_runner
    sizes = getattr(graph, "capture_bs", None)
    if sizes and composition.is_decode_like:
        width = getattr(graph, "captured_req_width", 1) or 1
        # SGLang takes the graph of the largest DP group for all of them.
        groups = _gathered_counts(forward_batch, active.moe_rows) or [composition.num_tokens]
        rows = max(groups)
        padded = next((size * width for size in sizes if size * width >= rows), rows)
        composition = dataclasses.replace(composition, padded_rows=padded * len(groups))
    active.begin_forward(composition, noted(forward_batch).classes)
    failed = True
    try:
        result = original(runner, forward_batch, *args, **kwargs)
        failed = False
        return result
    finally:
        active.end_forward(failed=failed)


def _forward_exact(
    original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """Captured graphs keep launching the kernels: the control block has to say that it is off."""
    active = process.current()
    if active is not None and not runner.is_draft_worker:
        active.exact_forward()
    return original(runner, forward_batch, *args, **kwargs)


def composition_of(batch: Any, rows: MoeRows, parallel: Any) -> BatchComposition:
    """The batch that is about to run, from SGLang's ``ForwardBatch`` (before padding).

    `parallel` is SGLang's ``get_parallel()``: on which ranks the rows are.
    """
    counts = _gathered_counts(batch, rows)
    if counts is not None:
        return _composition_of_all_groups(batch, sum(counts))
    mode = _MODES.get(batch.forward_mode.name, "extend")
    if parallel.attn_dp_enabled and mode != "idle" and batch.is_extend_in_batch:
        mode = "mixed"  # another group prefills into the same experts
    tokens = 0 if mode == "idle" else int(batch.input_ids.shape[0])
    if rows is MoeRows.SLICE:
        tokens = -(-tokens // parallel.attn_tp_size)
    decode = verify = prefill = 0
    if mode == "decode":
        decode = tokens
    elif mode == "verify":
        verify = tokens
    elif mode == "mixed":
        lengths = batch.extend_seq_lens_cpu or []
        prefill = min(sum(n for n in lengths if n > 1), tokens)
        decode = tokens - prefill
    else:
        prefill = tokens
    seen = noted(batch)
    return BatchComposition(
        mode=mode,
        decode_tokens=decode,
        prefill_tokens=prefill,
        verify_tokens=verify,
        padded_rows=tokens,
        running=seen.running,
        waiting=seen.waiting,
        after_idle=seen.after_idle,
    )


def _gathered_counts(batch: Any, rows: MoeRows) -> list[int] | None:
    """Rows of each DP group, which SGLang's scheduler has exchanged; None when they are not
    gathered."""
    return batch.global_num_tokens_cpu if rows is MoeRows.GATHERED else None


def _composition_of_all_groups(batch: Any, tokens: int) -> BatchComposition:
    """From nothing but what every group knows, so that all of them decide alike; a group without
    requests too."""
    mode: Mode = "decode"
    if tokens == 0:
        mode = "idle"
    elif batch.is_extend_in_batch:
        mode = "mixed"
    elif batch.spec_info is not None:
        mode = "verify"
    per_request = 1
    if mode == "verify":  # a group without requests has -1
        per_request = max(1, getattr(batch.spec_info, "num_tokens_per_req", 1))
    return BatchComposition(
        mode=mode,
        decode_tokens=tokens if mode == "decode" else 0,
        prefill_tokens=tokens if mode == "mixed" else 0,
        verify_tokens=tokens if mode == "verify" else 0,
        padded_rows=tokens,
        running=0 if mode in ("idle", "mixed") else tokens // per_request,
        after_idle=noted(batch).after_idle,
    )
