"""What the GPU tests share: shapes of published models, what a GPU has, a CUDA graph of a step."""

from __future__ import annotations

from collections.abc import Callable

import torch

SIZES = [(60, 4), (64, 6), (128, 8), (256, 8), (512, 10), (1024, 32)]
"""Experts, top-k."""


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of `step`, which has run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def not_for_this_gpu(name: str) -> str | None:
    """Why an implementation does not apply to this GPU. A missing compiler is no such reason."""
    from sere_sglang.ops.cuda.library import OLDEST_GPU

    if name != "cuda":
        return None
    if torch.version.cuda is None:
        return "cuda needs an NVIDIA GPU"
    if torch.cuda.get_device_capability() < OLDEST_GPU:
        return f"cuda needs sm_80 or newer, not {torch.cuda.get_device_name()}"
    return None
