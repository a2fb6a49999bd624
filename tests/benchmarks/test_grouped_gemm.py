"""The benchmarks' own grouped GEMM, in Triton's interpreter, against a loop over experts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

CASES = [  # (T, K, E, H, I, dtype, tolerance); sizes that fill no tile, experts without slots
    (5, 2, 4, 48, 40, torch.float32, 1e-5),
    (1, 4, 9, 32, 32, torch.float32, 1e-5),
    (140, 2, 3, 40, 33, torch.float32, 1e-5),  # several tiles of rows per expert
    (9, 3, 8, 160, 64, torch.float16, 2e-3),
]


@pytest.mark.skipif(not INTERPRETED, reason="run by the test below, in an interpreter process")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_loop(case: tuple[int, int, int, int, int, torch.dtype, float]) -> None:
    from benchmarks.grouped_gemm import fused_experts, fused_experts_loop

    tokens, top_k, experts, hidden, inter, dtype, tolerance = case
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    w1 = (torch.randn(experts, 2 * inter, hidden, generator=generator) / hidden**0.5).to(dtype)
    w2 = (torch.randn(experts, hidden, inter, generator=generator) / inter**0.5).to(dtype)
    # The last expert is not used; a token may name another one twice.
    ids = torch.randint(0, experts - 1, (tokens, top_k), generator=generator, dtype=torch.int32)
    weights = torch.rand(tokens, top_k, generator=generator)
    want = fused_experts_loop(x, w1, w2, weights, ids)
    got = fused_experts(x, w1, w2, weights, ids)
    assert got.dtype == dtype
    assert (got.float() - want).norm() / want.norm() < tolerance


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter process")
def test_in_the_interpreter() -> None:
    """Triton decides at import whether kernels are interpreted, so in a process of its own."""
    only = test_equals_the_loop.__name__
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", only],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{len(CASES)} passed" in done.stdout


def test_the_loop_is_a_sum_over_slots() -> None:
    from benchmarks.grouped_gemm import fused_experts_loop

    x, w1, w2 = torch.randn(3, 4), torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    ids = torch.tensor([[0, 1], [1, 1], [0, 0]], dtype=torch.int32)
    weights = torch.rand(3, 2)
    want = torch.zeros(3, 4)
    for token in range(3):
        for slot in range(2):
            expert = int(ids[token, slot])
            gate, up = (w1[expert] @ x[token]).chunk(2)
            want[token] += weights[token, slot] * (
                w2[expert] @ (torch.nn.functional.silu(gate) * up)
            )
    torch.testing.assert_close(fused_experts_loop(x, w1, w2, weights, ids), want)
