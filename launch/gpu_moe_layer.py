"""One MoE layer of a served model beside a plain MoE in torch, in float32, on the same ids.

A plugin of SGLang's for ``launch/gpu_server_steps.py``: `environment` makes a server load it. Once
the server has its model, rows are sent through the layer's own router, SERE's stage
behind it and the MoE runner, and what came out is compared row by row with what those ids and
weights ask for. Rows are made alike and apart, in the numbers at which runners take other kernels.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.plugin import plugin_environment
from sere_sglang.ops import COUNTER_FIELDS

_FOLDER = "SERE_MOE_LAYER"
ROWS = (1, 4, 8, 16, 64, 300)
"""moe_align_block_size has a kernel for one row; FlashInfer's change at 4, 16 and 256."""
TOLERANCE = 0.02
"""Of a row's output: |y - reference| / |reference|. bfloat16 rounds what is between an expert's two
products, and what comes out, to 2^-9 of each number: a right row is some 0.004 away. One that has
lost a slot, or has one too many, is away by that slot's share of the row."""


@dataclass(frozen=True)
class Experts:
    """As the model has them: w13 ``[E, 2, N, H]``, gate before up, and w2 ``[E, H, N]``."""

    w13: torch.Tensor
    w2: torch.Tensor

    @classmethod
    def drawn(cls, layer: Any) -> Experts:
        """New weights for a ``FusedMoE`` whose runner has not repacked them yet.

        SGLang's dummies, all within 0.001, leave SiLU in its linear part, where gate and up could
        be taken for each other unseen.
        """
        made = torch.Generator(device=layer.w13_weight.device).manual_seed(layer.layer_id)
        for weight in (layer.w13_weight, layer.w2_weight):
            if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                raise NotImplementedError(f"a reference for experts in {weight.dtype}")
            weight.data.normal_(std=weight.shape[-1] ** -0.5, generator=made)
        w13 = layer.w13_weight.data.unflatten(1, (2, -1))
        # A copy: runners repack theirs in place.
        w13 = w13.flip(1) if reads_up_first(layer) else w13.clone()
        return cls(w13, layer.w2_weight.data.clone())


def reads_up_first(layer: Any) -> bool:
    """Whether its runner wants up before gate. SGLang's loader of checkpoints sees to that, its
    dummies do not: on them such a runner computes another model than the others."""
    return bool(getattr(layer.quant_method, "load_up_proj_weight_first", False))


def reference(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Experts
) -> torch.Tensor:
    """float32 ``[T, H]``: each row's weighted sum of SwiGLU experts, slot by slot, of hidden
    ``[T, H]``, ids and weights ``[T, K]``."""
    out = torch.zeros_like(hidden, dtype=torch.float32)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # SGLang lets some models have TF32
    for expert in ids.unique().tolist():
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden[rows].float() @ half.float().T for half in experts.w13[expert])
        down = (torch.nn.functional.silu(gate) * up) @ experts.w2[expert].float().T
        out.index_add_(0, rows, weights[rows, slots, None].float() * down)
    torch.set_float32_matmul_precision(precision)
    return out


def farthest(output: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the rows ``[T, H]``: how far the farthest is from what was wanted, as a share of that."""
    apart = (output.float() - wanted).norm(dim=1) / wanted.norm(dim=1)
    return float(apart.nan_to_num(nan=torch.inf).max())


def environment(folder: Path) -> dict[str, str]:
    """Of a server with one rank that leaves what it saw in `folder`, for `seen_in`."""
    about = plugin_environment(folder / "site", "moe_layer", "launch.gpu_moe_layer:register")
    return about | {_FOLDER: str(folder)}


def seen_in(folder: Path) -> dict[str, Any]:
    """What the server saw before it answered, as `check` says it."""
    seen: dict[str, Any] = json.loads(_seen(folder).read_text())
    return seen


def _seen(folder: Path) -> Path:
    return folder / "moe_layer.json"


def register() -> None:
    """In every process of the server; touches those that load a model."""
    if "sglang.srt.managers.scheduler" not in sys.modules:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sere_sglang.runtime.moe_layers import moe_layers, routers_of

    loaded: list[tuple[Any, Any, Experts]] = []

    def filled(_result: None, model: torch.nn.Module, *_args: Any, **_kwargs: Any) -> None:
        layers = moe_layers(model)
        last = max(layers)
        loaded.append((layers[last], routers_of(model)[last], Experts.drawn(layers[last])))

    def made(_result: None, *_args: Any, **_kwargs: Any) -> None:
        _seen(Path(os.environ[_FOLDER])).write_text(json.dumps(check(*loaded[0])))

    for target, function in (
        ("sglang.srt.model_loader.loader.initialize_dummy_weights", filled),
        ("sglang.srt.managers.scheduler.Scheduler.__init__", made),
    ):
        HookRegistry.register(target, function, HookType.AFTER)


@torch.no_grad()
def check(layer: Any, router: Any, experts: Experts) -> dict[str, Any]:
    """In a scheduler whose model is bound: what the runner of one ``FusedMoE`` makes of the rows
    behind its ``TopK``, off and at S = 1 and 2.

    passed: every row is within `TOLERANCE`, and rows made alike were all re-routed. cases: of each,
    how far its farthest row is, the experts that its rows name, the slots that moved, and whether
    a row names an expert twice.
    """
    from sere_sglang.runtime import process
    from sere_sglang.runtime.runners import output_factor, runner_of
    from sere_sglang.schedule.point import OFF, OperatingPoint

    runtime = process.current()
    assert runtime is not None, "a server without --moe-backend sere"
    binding = runtime.binding
    (stage,) = (each for each in binding.stages if each.layer_id == layer.layer_id)
    factor = output_factor(layer, router.topk_config) or 1.0
    cases: dict[str, dict[str, Any]] = {}
    silent = []
    with binding.capturing(launch=True):
        for count, alike in [(1, False), *itertools.product(ROWS[1:], (False, True))]:
            hidden, logits = _rows(layer, stage.table.num_experts, count, alike=alike)
            for primary_k in (0, 1, 2):
                name = f"{count} {'alike' if alike else 'apart'}, S={primary_k or 'off'}"
                point = OperatingPoint(True, primary_k) if primary_k else OFF
                binding.control.write(point, count)
                binding.counters.zero_()
                chosen = router(hidden, logits)
                ids, weights = chosen.topk_ids.clone(), chosen.topk_weights.clone()
                # Some runners write over their input.
                output = layer(hidden.clone(), chosen)
                wanted = factor * reference(hidden, ids, weights, experts)
                cases[name] = {
                    "far": round(farthest(output, wanted), 5),
                    "active": len(ids.unique()),
                    "moved": int(stage.counters[COUNTER_FIELDS.index("rerouted")]),
                    "repeats": any(len(set(row)) < len(row) for row in ids.tolist()),
                }
                if primary_k and alike and not cases[name]["moved"]:
                    silent.append(name)
    binding.control.write(OFF, 0)
    binding.counters.zero_()
    binding.forget_runs()
    worst = max(cases, key=lambda name: float(cases[name]["far"]))
    return {
        "passed": cases[worst]["far"] <= TOLERANCE and not silent,
        "runner": runner_of(layer),
        "distinct": stage.distinct,
        "reads up first": reads_up_first(layer),
        "worst": {worst: cases[worst]},
        "tolerance": TOLERANCE,
        "not re-routed": silent,
        "cases": cases,
    }


def _rows(
    layer: Any, num_experts: int, count: int, *, alike: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden ``[T, H]`` and router logits ``[T, E]``; alike: all rows choose the same experts."""
    made = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, layer.hidden_size, generator=made)
    logits = torch.randn(count, num_experts, generator=made)
    # As with real text: else many rows leave no expert that is nobody's first.
    logits += 2 * torch.randn(num_experts, generator=made)
    if alike:
        hidden = hidden[:1] + 0.01 * hidden
        logits = logits[:1].repeat(count, 1)
    device, dtype = layer.w2_weight.device, layer.params_dtype
    return hidden.to(device, dtype), logits.to(device, dtype)
