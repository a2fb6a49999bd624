"""What SGLang's MoE runners and dispatchers make of a layer's rows and of its output.

Read in SGLang 0.5.23 and in the kernels that it calls, where each line of the tables says; none was
run on a GPU. Rows with K different experts, which SGLang's own routers make, suit all of them;
re-routing can make such rows (docs/semantics.md, rule 8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from sere_sglang.errors import SereError
from sere_sglang.option import flag_of

Ids = Literal["repeated", "distinct", "inside", "unknown"]
"""What the rows that a kernel takes may hold: an expert twice; K different ones; nothing of ours,
as it routes by itself; not known, as its source could not be read."""
Skips = Literal["yes", "no", "with EP", "not read"]
"""Whether an id of -1 is a slot that does not run. Re-routing writes none, on any of them."""


@dataclass(frozen=True)
class Runner:
    """read: where `ids` is to be seen, from ``sglang/srt/layers/moe`` (F: flashinfer's sources)."""

    ids: Ids
    skips_minus_one: Skips
    read: str


@dataclass(frozen=True)
class Dispatcher(Runner):
    """rows: whose tokens a rank's top-k sees; "global" are all of its expert group's."""

    rows: Literal["global", "per rank"] = "per rank"


_CLOSED = "no source of its kernels in the packages"

RUNNERS = {
    "triton": Runner(
        "repeated",
        "with EP",
        "moe_runner/triton_utils/fused_moe.py: moe_align_block_size counts slots; filter_expert",
    ),
    "marlin": Runner(
        "repeated",
        "yes",
        "fused_moe_triton/fused_marlin_moe.py: moe_align_block_size, inactive prefix; one token: "
        "kernels/jit/csrc/moe/align_single_token.cuh breaks ties by slot",
    ),
    "cutlass": Runner(
        "repeated", "not read", "cutlass_moe.py: prepare_moe_input places each slot by itself"
    ),
    "W4AFp8MoEMethod": Runner(
        "repeated", "not read", "cutlass_w4a8_moe.py: offsets by slot, as cutlass"
    ),
    "deep_gemm": Runner(
        "distinct",
        "yes",
        "kernels/ops/moe/ep_moe_kernels.py: fused_moe_dispatch_index_triton_kernel, at most one "
        "slot of a token per expert",
    ),
    "flashinfer_cutlass": Runner(
        "distinct",
        "not read",
        "F: cutlass_fused_moe_kernels.cuh: blockExpertPrefixSumKernel stops at the first match",
    ),
    "flashinfer_trtllm_routed": Runner(
        "distinct",
        "not read",
        "F: trtllm_fused_moe_routing_custom.cuh: up to 16 tokens, one slot per token and expert",
    ),
    "flashinfer_trtllm": Runner(
        "inside", "not read", "topk.py: TopK.bind_runner_backend, BYPASSED; else as _routed"
    ),
    "experimental_sgl_trtllm": Runner(
        "inside", "not read", "topk.py: TopK.bind_runner_backend, BYPASSED without LoRA"
    ),
    "flashinfer_mxfp4": Runner(
        "inside", "not read", "topk.py: TopK.bind_runner_backend, BYPASSED but for fp4 experts"
    ),
    "triton_kernel": Runner(
        "inside", "not read", "topk.py: TopK.bind_runner_backend, TRITON_KERNEL"
    ),
    "flashinfer_megamoe": Runner("unknown", "not read", f"flashinfer_megamoe.py; {_CLOSED}"),
    "flashinfer_cutedsl": Runner(
        "unknown", "not read", "moe_runner/flashinfer_cutedsl.py; its sort was not followed"
    ),
    "hpc_ops": Runner("unknown", "not read", f"moe_runner/hpc_ops.py; {_CLOSED}"),
    "humming": Runner("unknown", "not read", "moe_runner/humming.py; not followed"),
    "experimental_sgl_marlin": Runner(
        "unknown", "not read", "lora/trtllm_lora_temp; aligns by kernels of its own"
    ),
    "lora_triton": Runner("unknown", "not read", "lora/moe/base_gemm_provider; not followed"),
    "lora_cutedsl": Runner("unknown", "not read", "lora/moe/base_gemm_provider; not followed"),
    "lora_marlin": Runner("unknown", "not read", "lora/moe/base_gemm_provider; not followed"),
    "aiter": Runner("unknown", "not read", f"moe_runner/aiter.py; {_CLOSED}"),
    "ascend": Runner("unknown", "not read", f"moe_runner/ascend.py; {_CLOSED}"),
    "intel_xpu": Runner("unknown", "not read", _CLOSED),
}
"""``MoeRunnerBackend`` value, or the class of a quantization method that calls a kernel itself."""

DISPATCHERS = {
    "none": Dispatcher(
        "repeated", "yes", "token_dispatcher/standard.py: hands ids on", rows="global"
    ),
    "deepep": Dispatcher(
        "distinct",
        "yes",
        "token_dispatcher/deepep.py; low latency counts slots of an expert up to the tokens of a "
        "rank (DeepEP: csrc/kernels/internode_ll.cu)",
    ),
    "deepep_v2": Dispatcher(
        "distinct", "not read", "token_dispatcher/deepep_v2.py: _masked_token_capacity"
    ),
    "mooncake": Dispatcher("unknown", "not read", f"token_dispatcher/mooncake.py; {_CLOSED}"),
    "nixl": Dispatcher("unknown", "not read", f"token_dispatcher/nixl.py; {_CLOSED}"),
    "pplx": Dispatcher("unknown", "not read", f"token_dispatcher/pplx.py; {_CLOSED}"),
    "mori": Dispatcher("unknown", "not read", f"token_dispatcher/moriep.py; {_CLOSED}"),
    "flashinfer": Dispatcher(
        "unknown", "not read", "token_dispatcher/flashinfer.py; its all-to-all was not followed"
    ),
    "megamoe": Dispatcher("unknown", "not read", _CLOSED),
    "flashinfer_megamoe": Dispatcher("unknown", "not read", _CLOSED),
    "ascend_fuseep": Dispatcher("unknown", "not read", _CLOSED),
    "ascend_tp": Dispatcher("unknown", "not read", _CLOSED),
    "customized": Dispatcher("unknown", "not read", "of an extension"),
}
"""``MoeA2ABackend`` value -> what it does. All but none take rows that a rank has to itself."""


def needs_distinct(runner: str, dispatcher: str) -> bool:
    """Whether rows must hold K different experts on this pair.

    Distinct rows cost a GPU something where A, what the batch runs, has fewer than K members:
    surplus slots then name experts outside it, which are loaded although their weight is 0.
    """
    known = RUNNERS.get(runner), DISPATCHERS.get(dispatcher)
    return any(part is None or part.ids != "repeated" for part in known)


def require_known(runner: str, dispatcher: str, *, allow_untested: bool, instead: str) -> None:
    """Raise `SereError` for a runner or dispatcher whose handling of rows is not known.

    instead: the ``--moe-runner-backend`` that works for this model on this GPU.
    """
    if allow_untested:
        return
    names = (
        ("--moe-runner-backend", runner, RUNNERS.get(runner), instead),
        ("--moe-a2a-backend", dispatcher, DISPATCHERS.get(dispatcher), "none"),
    )
    for flag, name, part, other in names:
        if part is not None and part.ids != "unknown":
            continue
        untested = flag_of("sere_allow_untested")
        if not name.islower():  # a quantization method that calls kernels of its own
            raise SereError(
                f"--moe-backend sere: what SGLang's {name} makes of re-routed rows is not known; "
                f"serve without --moe-backend sere, or try it with {untested}"
            )
        raise SereError(
            f"--moe-backend sere: what {flag} {name} makes of re-routed rows is not known; use "
            f"{flag} {other}, or try it with {untested}"
        )


def require_any_ids(layer: Any) -> None:
    """Raise `SereError` for a ``FusedMoE`` on a GPU whose runner does not take the ids of a
    calibration: every row once for each expert, one slot a row."""
    if any(p.device.type == "cpu" for p in layer.parameters()):
        return
    runner, dispatcher = runner_of(layer), dispatcher_name()
    if needs_distinct(runner, dispatcher):
        raise SereError(
            f"--model: a calibration gives every row to every expert, which --moe-runner-backend "
            f"{runner} with --moe-a2a-backend {dispatcher} is not made for; choose '-- "
            "--moe-runner-backend triton', or marlin for weights of 4 bits, and no all-to-all"
        )


def runner_of(layer: Any) -> str:
    """What computes a ``FusedMoE``, by its name in `RUNNERS`."""
    method = layer.quant_method
    backend = method.get_moe_runner_backend(layer)
    return type(method).__name__ if backend is None else str(backend.value)


def dispatcher_name() -> str:
    """In a worker: ``--moe-a2a-backend``, by its name in `DISPATCHERS`."""
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    return str(get_moe_a2a_backend().value)


def output_share(layer: Any) -> float:
    """Of a ``FusedMoE``'s output for its rows, what this rank returns: 1 where it is whole, 1 / n
    where the outputs of n ranks are added up behind it."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher
    from sglang.srt.layers.moe.utils import should_use_flashinfer_cutlass_moe_fp4_allgather

    # Other dispatchers, and an all-gather within the layer, hand whole rows back.
    if (
        layer.reduce_results
        or type(layer.dispatcher) is not StandardDispatcher
        or should_use_flashinfer_cutlass_moe_fp4_allgather()
    ):
        return 1.0
    return 1.0 / (int(layer.moe_tp_size) * int(layer.moe_ep_size))


def output_factor(layer: Any, topk_config: Any) -> float | None:
    """What a ``FusedMoE`` multiplies the weighted sum of its experts by; None if that is unknown.

    Models with a ``routed_scaling_factor`` have it multiplied into the routing weights by the
    router, or into the sum by the runner, or (the CPU engine) into the output by themselves.
    """
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher

    factor = layer.moe_runner_config.routed_scaling_factor
    on_cpu = any(p.device.type == "cpu" for p in layer.parameters())
    if factor in (None, 1.0) or on_cpu or scales_weights(topk_config):
        return 1.0
    if torch.version.hip or type(layer.dispatcher) is not StandardDispatcher:
        return None
    return float(factor)


def scales_weights(topk_config: Any) -> bool:
    """Whether a router's weights carry its model's ``routed_scaling_factor``."""
    from sglang.srt.layers.moe.topk import is_routed_scaling_factor_fused_in_topk

    return bool(is_routed_scaling_factor_fused_in_topk(topk_config))
