"""`compensate_`: every implementation against the sum it stands for."""

from __future__ import annotations

import pytest
import torch

from sere_sglang.ops.surrogates import Compensation, Surrogates, compensate_

IMPLS = ("cpu", "torch")


def _layer(experts: int, rank: int, size: int) -> Surrogates:
    generator = torch.Generator().manual_seed(experts + rank)
    inward, outward = torch.randn(2, experts, rank, size, generator=generator) / size**0.5
    bias = torch.randn(experts, size, generator=generator)
    return Surrogates.build(inward, outward, bias, device="cpu")


@pytest.mark.parametrize("name", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "experts", "rank", "size"), [
    (1, 2, 1, 1), (7, 12, 8, 96), (33, 5, 3, 37), (4, 6, 0, 16), (0, 4, 2, 8),
])  # fmt: skip
def test_adds_what_was_lost(
    name: str, dtype: torch.dtype, rows: int, experts: int, rank: int, size: int
) -> None:
    layer = _layer(experts, rank, size)
    generator = torch.Generator().manual_seed(7)
    hidden, before = torch.randn(2, rows, size, generator=generator).to(dtype)
    lost = torch.rand(rows, experts, generator=generator)
    lost *= torch.rand(rows, experts, generator=generator) < 0.4
    after = before.clone()
    compensate_(after, hidden, Compensation(lost, layer, 0.5), impl=name)
    want = before.double()
    for t in range(rows):
        for e in range(experts):
            inner = layer.inward[e].double() @ hidden[t].double()
            output = layer.outward[e].double().T @ inner + layer.bias[e].double()
            want[t] += 0.5 * lost[t, e].double() * output
    rounding = 2**-7 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(after.double(), want, rtol=rounding, atol=rounding)
    untouched = ~lost.any(dim=1)
    assert torch.equal(after[untouched], before[untouched])


def test_what_does_not_fit_is_named() -> None:
    layer = _layer(4, 2, 8)
    rows, lost = torch.zeros(3, 8), torch.zeros(3, 4)
    for output, hidden, wrong, message in (
        (rows, torch.zeros(2, 8), lost, "hidden must be"),
        (rows, rows, torch.zeros(3, 5), "lost must be"),
        (rows, rows.bfloat16(), lost, "one of them will do"),
        (rows, rows, lost.double(), "lost must be float32"),
        (torch.zeros(8, 3).T, rows, lost, "output must be contiguous"),
        (torch.zeros(3, 7), torch.zeros(3, 7), lost, "H=8"),
    ):
        with pytest.raises(ValueError, match=message):
            compensate_(output, hidden, Compensation(wrong, layer))
    with pytest.raises(ValueError, match="none of"):
        compensate_(rows, rows, Compensation(lost, layer), impl="gpu")
    with pytest.raises(ValueError, match="bias"):
        Surrogates.build(layer.inward, layer.outward, layer.bias[:2], device="cpu")
