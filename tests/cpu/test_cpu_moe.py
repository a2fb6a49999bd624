"""The CPU MoE runner against float64 loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sere_sglang.cpu import isa as cpu_isa
from sere_sglang.cpu import moe as cpu_moe
from sere_sglang.cpu.moe import fused_moe
from sere_sglang.ops import BuildError
from sere_sglang.ops.surrogates import Compensation, Surrogates

# Relative error of the whole output. bfloat16 has 8 bits: a rounded result is off by up to 2^-9,
# about 2e-3 in norm, and so is the rounded intermediate; the torch path also rounds gate and up.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 2e-6}


def implementations() -> list[str]:
    """Every instruction set that runs here, and torch."""
    try:
        cpu_moe.native_module()
    except BuildError:
        return ["torch"]
    return [*cpu_isa.executable(), "torch"]


def run(moe_impl: str, *arguments: torch.Tensor, **options: Any) -> torch.Tensor:
    if moe_impl == "torch":
        return fused_moe(*arguments, impl="torch", **options)
    return fused_moe(*arguments, impl="native", isa=moe_impl, **options)


def ref_fused_moe(
    hidden: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    inter_size = w2.shape[2]
    for t in range(hidden.shape[0]):
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            if e < 0:
                continue
            gate_up = w13[e].double() @ hidden[t].double()
            if w13_bias is not None:
                gate_up += w13_bias[e].double()
            gate, up = gate_up[:inter_size], gate_up[inter_size:]
            if activation == "silu":
                gate = gate / (1 + torch.exp(-gate))
            else:
                inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
                gate = 0.5 * gate * (1 + torch.tanh(inner))
            down = w2[e].double() @ (gate * up)
            if w2_bias is not None:
                down += w2_bias[e].double()
            out[t] += weights[t, k].double() * down
    return out


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == want.shape
    assert torch.isfinite(got).all()
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"
    # No single row may hide in the norm of the others.
    rows = (got.double() - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-6)
    assert (rows < 4 * TOLERANCE[dtype]).all()


def make(
    seed: int, tokens: int, experts: int, top_k: int, hidden: int, inter: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return (
        normal(tokens, hidden).to(dtype),
        (normal(experts, 2 * inter, hidden) / hidden**0.5).to(dtype),
        (normal(experts, hidden, inter) / inter**0.5).to(dtype),
        torch.randint(-1, experts, (tokens, top_k), generator=generator, dtype=torch.int32),
        torch.rand(tokens, top_k, generator=generator),
    )


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
@pytest.mark.parametrize(
    ("moe_impl", "dtype", "hidden", "inter"),
    [
        (impl, dtype, hidden, inter)
        for impl in implementations()
        for dtype in (torch.bfloat16, torch.float32)
        for hidden, inter in ((64, 32), (96, 160), (37, 21), (33, 1))
    ],
)
def test_equals_the_reference(
    moe_impl: str, dtype: torch.dtype, activation: str, hidden: int, inter: int, tokens: int
) -> None:
    arguments = make(1, tokens, 5, 3, hidden, inter, dtype)
    got = run(moe_impl, *arguments, activation=activation)
    assert_close(got, ref_fused_moe(*arguments, activation), dtype)


@pytest.mark.parametrize("moe_impl", implementations())
def test_random_sizes(moe_impl: str) -> None:
    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        seed=st.integers(0, 2**31),
        tokens=st.integers(0, 60),
        experts=st.integers(1, 20),
        top_k=st.integers(1, 6),
        hidden=st.integers(1, 4),
        inter=st.integers(1, 4),
        odd=st.booleans(),
        biased=st.booleans(),
    )
    def check(
        seed: int,
        tokens: int,
        experts: int,
        top_k: int,
        hidden: int,
        inter: int,
        odd: bool,
        biased: bool,
    ) -> None:
        shrink = 5 if odd else 0
        hidden, inter = 32 * hidden - shrink, 32 * inter - shrink
        arguments = make(seed, tokens, experts, top_k, hidden, inter, torch.bfloat16)
        biases: dict[str, torch.Tensor] = {}
        if biased:
            generator = torch.Generator().manual_seed(seed)
            w13_bias = torch.randn(experts, 2 * inter, generator=generator)
            w2_bias = torch.randn(experts, hidden, generator=generator)
            biases = {"w13_bias": w13_bias.bfloat16(), "w2_bias": w2_bias.bfloat16()}
        got = run(moe_impl, *arguments, **biases)
        want = ref_fused_moe(*arguments, "silu", **biases)
        assert_close(got, want, torch.bfloat16)

    check()


@pytest.mark.parametrize("moe_impl", implementations())
def test_one_expert_in_every_slot_is_summed(moe_impl: str) -> None:
    hidden, w13, w2, ids, weights = make(2, 20, 4, 4, 64, 32, torch.bfloat16)
    ids.fill_(2)
    got = run(moe_impl, hidden, w13, w2, ids, weights)
    once = run(moe_impl, hidden, w13, w2, ids[:, :1], weights.sum(1, keepdim=True))
    assert_close(got, ref_fused_moe(hidden, w13, w2, ids, weights, "silu"), torch.bfloat16)
    assert torch.allclose(got.float(), once.float(), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("moe_impl", implementations())
def test_empty_slots_give_zero_rows(moe_impl: str) -> None:
    hidden, w13, w2, ids, weights = make(3, 6, 4, 2, 64, 32, torch.bfloat16)
    ids[::2] = -1
    out = run(moe_impl, hidden, w13, w2, ids, weights)
    assert (out[::2] == 0).all()
    assert (run(moe_impl, hidden, w13, w2, ids.fill_(-1), weights) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "hidden", "rank"), [
    (1, 33, 1), (20, 96, 8), (40, 64, 0), (2100, 64, 3),
])  # fmt: skip
@pytest.mark.parametrize("moe_impl", implementations())
def test_what_tokens_lost_is_added(
    moe_impl: str, dtype: torch.dtype, tokens: int, hidden: int, rank: int
) -> None:
    """Whichever experts the layer itself holds; rows that lost nothing stay as they are."""
    arguments = make(8, tokens, 5, 2, hidden, 32, dtype)
    generator = torch.Generator().manual_seed(9)
    inward, outward = torch.randn(2, 12, rank, hidden, generator=generator) / hidden**0.5
    bias = torch.randn(12, hidden, generator=generator)
    of = Surrogates.build(inward, outward, bias, device="cpu")
    lost = torch.rand(tokens, 12, generator=generator)
    lost *= (lost < 0.2) & (torch.arange(tokens) % 5 != 1)[:, None]
    plain = run(moe_impl, *arguments)
    got = run(moe_impl, *arguments, compensation=Compensation(lost, of, 0.5))
    inner = torch.einsum("th,erh->ter", arguments[0].double(), of.inward.double())
    added = torch.einsum("te,ter,erk->tk", lost.double(), inner, of.outward.double())
    added += lost.double() @ of.bias.double()
    assert_close(got, plain.double() + 0.5 * added, dtype)
    assert torch.equal(got[~lost.any(dim=1)], plain[~lost.any(dim=1)])
    some = slice(tokens // 2, tokens // 2 + 7)  # alone as in company
    alone = (arguments[0][some], *arguments[1:3], *(a[some] for a in arguments[3:]))
    again = run(moe_impl, *alone, compensation=Compensation(lost[some], of, 0.5))
    assert moe_impl == "torch" or torch.equal(again, got[some])


@pytest.mark.parametrize("moe_impl", implementations())
def test_weights_of_idle_experts_are_not_read(moe_impl: str) -> None:
    hidden, w13, w2, ids, weights = make(4, 20, 6, 2, 64, 32, torch.bfloat16)
    ids[ids == 3] = 1
    want = run(moe_impl, hidden, w13, w2, ids, weights)
    w13[3], w2[3] = float("nan"), float("nan")
    assert torch.equal(run(moe_impl, hidden, w13, w2, ids, weights), want)


@pytest.mark.parametrize("moe_impl", implementations())
def test_slots_of_weight_0_are_no_work(moe_impl: str) -> None:
    """Whatever expert they name: it is not read, and the others' sums are bit for bit the same."""
    hidden, w13, w2, ids, weights = make(4, 20, 6, 3, 64, 32, torch.bfloat16)
    ids[ids == 3] = 1
    weights[::2, 1] = 0.0
    want = run(moe_impl, hidden, w13, w2, ids.masked_fill(weights == 0, -1), weights)
    ids[::2, 1] = 3
    w13[3], w2[3] = float("nan"), float("nan")
    assert torch.equal(run(moe_impl, hidden, w13, w2, ids, weights), want)


@pytest.mark.parametrize("moe_impl", implementations())
def test_prefill_longer_than_one_pass(moe_impl: str) -> None:
    hidden, w13, w2, ids, weights = make(5, 2100, 4, 2, 64, 32, torch.bfloat16)
    got = run(moe_impl, hidden, w13, w2, ids, weights)
    sample = [0, 1023, 1024, 1500, 2048, 2099]
    want = ref_fused_moe(hidden[sample], w13, w2, ids[sample], weights[sample], "silu")
    assert_close(got[sample], want, torch.bfloat16)


def test_extreme_activations_stay_finite() -> None:
    hidden, w13, w2, ids, weights = make(6, 4, 2, 2, 64, 32, torch.bfloat16)
    for moe_impl in implementations():
        out = run(moe_impl, hidden * 1e4, w13, w2, ids, weights)
        want = ref_fused_moe(hidden * 1e4, w13, w2, ids, weights, "silu")
        assert_close(out, want, torch.bfloat16)


def test_strided_activations_are_accepted() -> None:
    hidden, w13, w2, ids, weights = make(7, 9, 4, 2, 64, 32, torch.bfloat16)
    wide = torch.zeros(9, 100, dtype=torch.bfloat16)
    wide[:, :64] = hidden
    got = fused_moe(wide[:, :64], w13, w2, ids.long(), weights)
    assert torch.equal(got, fused_moe(hidden, w13, w2, ids, weights))


_STAND_INS = Surrogates.build(*torch.zeros(2, 4, 1, 8), torch.zeros(4, 8), device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 8, dtype=torch.float16)}, "bfloat16 or float32"),
        ({"hidden": torch.zeros(2, 9)}, r"hidden must be \[T, H=8\]"),
        ({"w2": torch.zeros(3, 8, 4).bfloat16()}, "w2 is torch.bfloat16"),
        ({"w13": torch.zeros(3, 7, 8)}, "w13 .* does not fit"),
        ({"w13": torch.zeros(3, 8, 8).transpose(1, 2)}, "w13 must be contiguous"),
        ({"topk_weights": torch.zeros(2, 3)}, "topk_weights"),
        ({"activation": "relu"}, "choose one of: silu, gelu"),
        ({"impl": "best"}, "choose one of: auto, native, torch"),
        ({"compensation": Compensation(torch.zeros(3, 4), _STAND_INS)}, r"lost must be \[2, 4\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    valid = {
        "hidden": torch.zeros(2, 8),
        "w13": torch.zeros(3, 8, 8),
        "w2": torch.zeros(3, 8, 4),
        "topk_ids": torch.zeros(2, 2, dtype=torch.int32),
        "topk_weights": torch.zeros(2, 2),
    }
    with pytest.raises(ValueError, match=message):
        fused_moe(**{**valid, **change})


def test_without_a_compiler_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BuildError("no C++ compiler found")

    monkeypatch.setattr(cpu_moe, "native_module", fail)
    cpu_moe._native_or_none.cache_clear()
    try:
        arguments = make(8, 3, 4, 2, 64, 32, torch.bfloat16)
        got = fused_moe(*arguments)
        assert_close(got, ref_fused_moe(*arguments, "silu"), torch.bfloat16)
    finally:
        cpu_moe._native_or_none.cache_clear()
