"""The published sequence, as a kernel and in torch, does what `reroute` does on its inputs."""

from __future__ import annotations

import pytest
import torch

from benchmarks import published_sequence
from benchmarks.cpu_reroute import make_inputs
from sere_sglang.ops import BuildError, reroute
from sere_sglang.ops.jit import find_nvcc

SIZES = [(1, 60, 4), (5, 8, 8), (64, 128, 8), (33, 512, 10)]  # (T, E, K)


@pytest.mark.parametrize(("primary_k", "threshold"), [(1, 0.0), (2, 0.3), (3, 0.9)])
def test_equals_reroute(primary_k: int, threshold: float) -> None:
    for tokens, experts, top_k in SIZES:
        ids, _, similarity = make_inputs(tokens, experts, top_k)
        want = reroute(ids, similarity, primary_k=primary_k, threshold=threshold, impl="torch")
        assert torch.equal(
            published_sequence.run_torch(ids, similarity, primary_k, threshold), want
        )
        in_place = ids.clone()
        published_sequence.run_native(in_place, similarity, primary_k, threshold)
        assert torch.equal(in_place, want)


def test_lowest_expert_wins_a_tie() -> None:
    ids = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    similarity = torch.ones(4, 4)
    published_sequence.run_native(ids, similarity, 1, 0.0)
    assert ids.tolist() == [[3, 1], [1, 1]]


def test_compiles_for_a_gpu() -> None:
    try:
        find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    module = published_sequence.native_module("cuda", "sm_90a")
    assert module.scan is not None
    assert module.empty is not None
