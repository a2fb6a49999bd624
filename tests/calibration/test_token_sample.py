"""Which tokens are kept to try rules on, and what routers' scores are read from."""

from __future__ import annotations

import pytest
import torch

from sere_sglang.calibration.router_scores import scores_behind
from sere_sglang.calibration.surrogates import HELD_EVERY
from sere_sglang.calibration.token_sample import GROUP, TokenSample, sample_tokens, token_bytes

TOKENS, SEQUENCE = 4000, 64
ROWS = torch.arange(float(TOKENS))[:, None].expand(-1, 3)
IDS = torch.arange(TOKENS)[:, None].expand(-1, 2)


def _filled(step: int, size: int, sequence: int | None = SEQUENCE) -> TokenSample:
    sample = TokenSample(size, sequence)
    for start in range(0, TOKENS, step):
        part = slice(start, start + step)
        sample.add(start, ROWS[part], IDS[part], ROWS[part, :2], ROWS[part])
    return sample


@pytest.mark.parametrize("size", [GROUP, 96, 10_000])
def test_the_sample_does_not_depend_on_how_the_text_is_cut(size: int) -> None:
    whole = _filled(TOKENS, size)
    assert len(whole) == min(size, TOKENS // HELD_EVERY - TOKENS // HELD_EVERY % SEQUENCE)
    for step in (7, 64, 1000):
        cut = _filled(step, size)
        assert cut.parts.keys() == whole.parts.keys()
        assert all(cut.parts[name].equal(part) for name, part in whole.parts.items())
    assert whole.parts["keys"].diff().min() > 0


def test_it_is_of_held_out_sequences_and_scattered() -> None:
    places = _filled(100, 256).parts["rows"][:, 0].long()
    assert set((places // SEQUENCE % HELD_EVERY).tolist()) == {HELD_EVERY - 1}
    assert len(set((places // SEQUENCE).tolist())) == TOKENS // SEQUENCE // HELD_EVERY
    neighbours = places.diff().abs()
    assert neighbours.double().mean() > TOKENS / 5, "as in a decode batch"
    everywhere = _filled(100, 256, None).parts["rows"][:, 0]
    assert len(set((everywhere // SEQUENCE % HELD_EVERY).tolist())) == HELD_EVERY


def test_it_goes_on_from_what_was_kept() -> None:
    first = TokenSample(96, SEQUENCE)
    first.add(0, ROWS[:1500], IDS[:1500], ROWS[:1500, :2], None)
    then = TokenSample(96, SEQUENCE)
    then.restore(first.parts)
    for sample in (first, then):
        sample.add(1500, ROWS[1500:], IDS[1500:], ROWS[1500:, :2], None)
    assert all(then.parts[name].equal(part) for name, part in first.parts.items())
    assert "scores" not in first.parts


def test_samples_of_all_layers_fit_an_eighth_of_the_memory() -> None:
    tokens = sample_tokens(1 << 30, 128, 2048, 48)
    assert tokens % GROUP == 0 and GROUP * 2 < tokens < 1024
    assert 48 * tokens * token_bytes(128, 2048) <= 1 << 27
    assert sample_tokens(1 << 30, 48, 256, 4) == 1024
    assert sample_tokens(1 << 16, 128, 2048, 48) == 0


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_found_by_what_the_router_chose(
    function: str, renormalize: bool, dtype: torch.dtype
) -> None:
    logits = 2 * torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    scores = logits.softmax(-1) if function == "softmax" else logits.sigmoid()
    chosen = (scores + 0.1 * torch.rand(16)).topk(4).indices  # with a bias of selection
    weights = scores.gather(1, chosen) * 2.5
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    found = scores_behind(logits, chosen, weights.to(dtype))
    assert found is not None and torch.equal(found, scores)


def test_a_router_of_another_kind_has_none() -> None:
    logits = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    weights, chosen = logits.abs().topk(4)
    assert scores_behind(logits, chosen, weights) is None
