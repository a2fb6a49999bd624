"""SGLang's own kernels for the benchmarks: softmax top-k and the fused MoE in Triton.

From the wheels that ``launch/gpu_wheels.sh`` downloads, or an installed SGLang 0.5.17 and later.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks._timing import first_line

FusedExperts = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]


class Unavailable(RuntimeError):
    """SGLang's kernels cannot be used here; says why."""


@functools.cache
def load_topk_softmax() -> Callable[..., Any]:
    """``topk_softmax(weights_out [T, K], ids_out [T, K], logits [T, E], renormalize)``."""
    try:
        from sgl_kernel import topk_softmax
    except (Exception, SystemExit) as error:  # of another GPU or torch, it raises all sorts
        raise Unavailable(f"sgl_kernel: {first_line(error)}") from error
    return topk_softmax


@functools.cache
def load_fused_experts() -> tuple[FusedExperts, str]:
    """SGLang's fused MoE as ``f(x, w1, w2, weights, ids) -> y``, and its name and version.

    It reads a server's configuration and tensor-parallel group; a default one and a group of one
    stand in. Every expert is local, as on a server without expert parallelism.
    """
    try:
        import sglang
        from sglang.srt.distributed import parallel_state
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
        from sglang.srt.runtime_context import get_context

        logging.getLogger(fused_moe.__name__ + "_triton_config").setLevel(logging.ERROR)
        get_context().override_server_args().install()
        if parallel_state._TP is None:
            parallel_state._TP = SimpleNamespace(world_size=1)
    except (Exception, SystemExit) as error:
        raise Unavailable(f"SGLang: {first_line(error)}") from error

    def fused_experts(
        x: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        return fused_moe.fused_experts_impl(x, w1, w2, weights, ids, filter_expert=False)

    return fused_experts, f"SGLang {sglang.__version__} fused_moe (Triton)"
