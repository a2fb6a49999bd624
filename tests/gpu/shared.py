"""What the GPU tests share: shapes of published models, and a CUDA graph of a step."""

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
