"""Run by test_probe.py: what the probe makes of real ``FusedMoE`` layers, as one JSON line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from sere_sglang.patches import cpu_moe
from sere_sglang.runtime import bandwidth, probe
from sere_sglang.schedule.cost_file import describe

LAYERS, EXPERTS, TOP_K, HIDDEN = 3, 16, 4, 64

warnings: list[str] = []
calls: list[tuple[int, int]] = []  # (rows, distinct experts) of every forward


class Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warnings.append(record.getMessage())


def layers(widths: tuple[int, ...] = (32,) * LAYERS) -> dict[int, FusedMoE]:
    """As many layers of random weights, and of these widths of an expert."""
    torch.set_default_dtype(torch.bfloat16)
    made = {i: FusedMoE(EXPERTS, HIDDEN, w, i, top_k=TOP_K) for i, w in enumerate(widths)}
    torch.set_default_dtype(torch.float32)
    for layer in made.values():
        for parameter in layer.parameters():
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        apply = layer.quant_method.apply

        def counted(*args: Any, apply: Callable[..., Any] = apply, **kwargs: Any) -> Any:
            ids = kwargs["dispatch_output"].topk_output.topk_ids
            assert all(len(set(row)) == TOP_K for row in ids.tolist()), "an expert twice in a row"
            calls.append((len(ids), len(ids.unique())))
            return apply(*args, **kwargs)

        layer.quant_method.apply = counted
    return made


def cost_of(made: dict[int, FusedMoE], **options: Any) -> dict[str, Any]:
    warnings.clear()
    calls.clear()
    top_k = dict.fromkeys(made, TOP_K)
    cost = probe.moe_cost(made, top_k, device=torch.device("cpu"), **options)
    # Any cost must do for a policy.
    times = [float(cost.moe_ms(rows, len(made) * 8.0)) for rows in (1, 3, 8, 64, 4096)]
    told = {"cost": describe(cost), "times": times, "text": str(cost)}
    return told | {"warnings": list(warnings), "calls": list(calls)}


def failing(error: Exception, from_rows: int = 0) -> dict[int, FusedMoE]:
    """Layers whose runner raises when it gets so many rows."""
    made = layers()
    for layer in made.values():
        apply = layer.quant_method.apply

        def raises(*args: Any, apply: Callable[..., Any] = apply, **kwargs: Any) -> Any:
            if len(kwargs["dispatch_output"].hidden_states) >= from_rows:
                raise error
            return apply(*args, **kwargs)

        layer.quant_method.apply = raises
    return made


def repacked() -> dict[int, FusedMoE]:
    """Layers that keep their experts where no parameter shows them."""
    made = layers()
    for layer in made.values():
        held = {name: p.data for name, p in layer.named_parameters()}
        for name, data in held.items():
            delattr(layer, name)
            layer.__dict__[name] = data
        assert not list(layer.parameters())
    return made


def reducing() -> dict[int, FusedMoE]:
    """Layers that sum over ranks which are not there."""
    made = layers()
    for layer in made.values():
        layer.reduce_results, layer.moe_tp_size = True, 2
    return made


def no_memory(size: int, *_args: Any, **_kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")


def main() -> None:
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cpu"))
    cpu_moe.install()
    logging.getLogger("sere_sglang").addHandler(Listener())
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
    found: dict[str, Any] = {}
    alone: dict[str, Any] = {"moe_ep_rank": 0, "moe_tp_rank": 0, "moe_ep_size": 1, "moe_tp_size": 1}
    alone["tp_group"] = SimpleNamespace(world_size=1)
    with get_parallel().override(**alone):
        cost_of(layers())  # compiles the runner
        found["measured"] = cost_of(layers())
        found["two shapes"] = cost_of(layers((32, 32, 64)))
        found["repacked"] = cost_of(repacked())
        made = reducing()
        found["reducing"] = cost_of(made)
        found["reducing"]["restored"] = all(layer.reduce_results for layer in made.values())
        found["unsupported"] = cost_of(failing(NotImplementedError("no such activation")))
        found["out of memory"] = cost_of(failing(out_of_memory, from_rows=64))
        found["deferred"] = cost_of(layers(), deferred_weights=True)
        found["another rank"] = cost_of(failing(out_of_memory), warns=False)
        made = layers()
        made[0].dispatcher = object()
        found["dispatcher"] = cost_of(made)
        bandwidth.torch.ones = no_memory  # type: ignore[assignment]
        found["no memory at all"] = cost_of(failing(out_of_memory))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
