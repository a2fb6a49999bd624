"""Large pages under weights."""

from __future__ import annotations

import torch

from sere_sglang.cpu.large_pages import LARGE_PAGE, use_large_pages


def test_contents_and_addresses_stay() -> None:
    weights = torch.arange(3 * LARGE_PAGE, dtype=torch.int32)
    want, address = weights.clone(), weights.data_ptr()
    moved = use_large_pages(weights)
    assert moved % LARGE_PAGE == 0 and 0 <= moved <= weights.nbytes
    assert weights.data_ptr() == address
    assert torch.equal(weights, want)


def test_what_fills_no_large_page_is_left_alone() -> None:
    assert use_large_pages(torch.ones(8), torch.empty(0)) == 0
