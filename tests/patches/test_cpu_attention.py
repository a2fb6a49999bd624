"""Decode attention of the CPU engine beside SGLang's own loop over requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sere_sglang.patches.cpu_attention import _decode

LENGTHS = {
    "mixed": (1, 7, 90, 33, 64),
    "alike": (16, 16, 16),
    "one request": (50,),
    "one much longer": (1, 2, 400, 1, 3),
    "none": (),
}
SCALE = 0.2


class Loop:
    """SGLang's, and how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.runs += 1
        own = getattr(TorchNativeAttnBackend._run_sdpa_forward_decode, "__wrapped__", None)
        return (own or TorchNativeAttnBackend._run_sdpa_forward_decode)(*args, **kwargs)


def _case(lengths: tuple[int, ...], heads: tuple[int, int], sizes: tuple[int, int]) -> list[Any]:
    """heads: of queries and of keys; sizes: of a key and of a value."""
    made = torch.Generator().manual_seed(0)
    most = 1024
    keys, values = (torch.randn(most, heads[1], size, generator=made).bfloat16() for size in sizes)
    query = torch.randn(len(lengths), heads[0], sizes[0], generator=made).bfloat16()
    output = torch.full((len(lengths), heads[0], sizes[1]), torch.nan, dtype=torch.bfloat16)
    # Behind a request's tokens its row of the table holds what was there before.
    table = torch.stack([torch.randperm(most, generator=made) for _ in range(8)]).int()
    rows = torch.randperm(8, generator=made)[: len(lengths)]
    return [query, output, keys, values, table, rows, torch.tensor(lengths, dtype=torch.int64)]


def _both(case: list[Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ours, SGLang's, and how often ours left it to SGLang's."""
    output, theirs = case[1], torch.empty_like(case[1])
    gqa = case[0].shape[1] != case[2].shape[1]
    given = {"scaling": SCALE, "enable_gqa": gqa, "causal": False, "is_cross_attn": False}
    backend = object.__new__(TorchNativeAttnBackend)
    loop = Loop()
    ours = _decode(loop, backend, *case, **(given | options))
    left = loop.runs
    loop(backend, case[0], theirs, *case[2:], **(given | options))
    assert ours is output
    return output, theirs, left


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    ("heads", "sizes"),
    [((4, 4), (32, 32)), ((8, 2), (32, 32)), ((8, 1), (48, 32))],
    ids=["MHA", "GQA", "MLA"],
)
def test_it_attends_as_sglang_does(
    lengths: tuple[int, ...], heads: tuple[int, int], sizes: tuple[int, int]
) -> None:
    ours, theirs, left = _both(_case(lengths, heads, sizes))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-6)
    # One length for all would read far more keys than the requests have.
    assert left == (lengths in (LENGTHS["one request"], LENGTHS["one much longer"], ()))


def test_a_sliding_window_is_sglangs_own() -> None:
    ours, theirs, left = _both(_case((40, 50), (4, 2), (32, 32)), sliding_window_size=8)
    assert left and torch.equal(ours, theirs)
    without, _, left = _both(_case((40, 50), (4, 2), (32, 32)), sliding_window_size=-1)
    assert not left and not torch.equal(ours, without)
