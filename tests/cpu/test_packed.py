"""Expert weights in the kernels' order: where they are, and back."""

from __future__ import annotations

import pytest
import torch

from sere_sglang.cpu import isa as cpu_isa
from sere_sglang.cpu.moe import fused_moe, fused_moe_packed, native_module, pack_experts
from sere_sglang.cpu.packed import PackedExperts

HERE = cpu_isa.executable()
DTYPES = (torch.bfloat16, torch.float32)


def _weights(
    hidden_size: int, inter_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(hidden_size + inter_size)
    shapes = ((5, 2 * inter_size, hidden_size), (5, hidden_size, inter_size))
    first, second = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return first, second


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", HERE)
def test_in_place_and_back(isa: str, dtype: torch.dtype) -> None:
    w13, w2 = _weights(64, 48, dtype)
    before = w13.clone(), w2.clone()
    packed = PackedExperts.pack(native_module(isa), w13, w2, in_place=True)
    assert packed.w13.data_ptr() == w13.data_ptr() and packed.w2.data_ptr() == w2.data_ptr()
    assert packed.in_blocks != torch.equal(w13, before[0])
    assert packed.in_blocks or isa == "amx"
    for matrix, rows in ((w13, before[0]), (w2, before[1])):
        assert torch.equal(matrix.flatten(1).sort().values, rows.flatten(1).sort().values)
    packed.unpack()
    assert torch.equal(w13, before[0]) and torch.equal(w2, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(64, 48), (50, 48), (64, 21), (33, 1)])
def test_the_caller_s_weights_stay(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """Unless they are given away, and can be packed where they are."""
    w13, w2 = _weights(*sizes, dtype)
    before = w13.clone(), w2.clone()
    for in_place in (False, any(size % 16 for size in sizes)):
        packed = PackedExperts.pack(native_module(), w13, w2, in_place=in_place)
        if sizes[0] % 16 or not in_place:
            assert torch.equal(w13, before[0]) and torch.equal(w2, before[1])
        assert (packed.hidden_size, packed.inter_size) == sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(64, 48), (50, 21)])
def test_packed_once_is_packed_at_every_call(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    w13, w2 = _weights(*sizes, dtype)
    x = torch.randn(7, sizes[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    ids = torch.randint(0, 5, (7, 3), generator=torch.Generator().manual_seed(2))
    want = fused_moe(x, w13, w2, ids, torch.ones(7, 3), impl="native")
    packed = pack_experts(w13, w2)
    assert packed is not None
    assert torch.equal(fused_moe_packed(x, packed, ids, torch.ones(7, 3)), want)


def test_what_does_not_fit_is_refused() -> None:
    packed = PackedExperts.pack(native_module(), *_weights(64, 48, DTYPES[0]), in_place=True)
    ids, weights = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"hidden must be \[T, H=64\], got \[2, 32\]"):
        fused_moe_packed(torch.zeros(2, 32, dtype=DTYPES[0]), packed, ids, weights)
    with pytest.raises(ValueError, match=r"weights are torch.bfloat16, hidden is torch.float32"):
        fused_moe_packed(torch.zeros(2, 64), packed, ids, weights)
    with pytest.raises(ValueError, match="relu"):
        fused_moe_packed(
            torch.zeros(2, 64, dtype=DTYPES[0]), packed, ids, weights, activation="relu"
        )
