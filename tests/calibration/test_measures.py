"""The streamed measures against their definitions, over random layers and random blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_sglang.calibration.cka import cka_matrix
from sere_sglang.calibration.collection import CKA_MEASURES
from sere_sglang.calibration.measures import (
    MOMENT_MEASURES,
    Moments,
    similarity,
    substitution_scale,
)
from tests.calibration import definitions

TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-6}


@st.composite
def layers(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Outputs [E, T, H] float64 with near and exact twins, routing [T, E], sizes of blocks."""
    experts = draw(st.integers(2, 9))
    tokens = draw(st.integers(3, 24))
    hidden = draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    common = torch.randn(1, tokens, hidden, generator=generator)
    spread = draw(st.sampled_from([1e-3, 0.3, 3.0]))
    outputs = common + spread * torch.randn(experts, tokens, hidden, generator=generator)
    outputs *= draw(st.sampled_from([1e-2, 1.0, 30.0]))
    if draw(st.booleans()):
        outputs[1] = outputs[0]
    routed = torch.rand(tokens, experts, generator=generator) < draw(st.sampled_from([0.2, 0.6]))
    cuts, left = [], tokens
    while left:
        cuts.append(draw(st.integers(1, left)))
        left -= cuts[-1]
    return outputs.to(torch.float64), routed, cuts


def moments_of(
    outputs: torch.Tensor, routed: torch.Tensor, cuts: list[int], weighting: str
) -> Moments:
    moments = Moments(len(outputs), weighting=weighting)
    for block, sent in zip(outputs.split(cuts, dim=1), routed.split(cuts), strict=True):
        moments.update(block, sent)
    return moments


@given(layers())
@settings(max_examples=150, deadline=None)
def test_all_tokens(layer: tuple[torch.Tensor, torch.Tensor, list[int]]) -> None:
    outputs, routed, cuts = layer
    moments = moments_of(outputs, routed, cuts, "all")
    for measure in MOMENT_MEASURES:
        expected = definitions.BY_NAME[measure](outputs.numpy())
        np.testing.assert_allclose(similarity(moments, measure).numpy(), expected, **TOLERANCE)
    np.testing.assert_allclose(
        substitution_scale(moments).numpy(), definitions.scale(outputs.numpy()), **TOLERANCE
    )
    sent = routed.numpy().astype(int)
    assert np.array_equal(moments.coactivation.numpy(), sent.T @ sent)


@given(layers())
@settings(max_examples=100, deadline=None)
def test_routed_tokens(layer: tuple[torch.Tensor, torch.Tensor, list[int]]) -> None:
    outputs, routed, cuts = layer
    moments = moments_of(outputs, routed, cuts, "routed")
    y, sent = outputs.numpy(), routed.numpy()
    for measure in ("cosine", "residual"):
        expected = definitions.routed(y, sent, definitions.BY_NAME[measure])
        np.testing.assert_allclose(similarity(moments, measure).numpy(), expected, **TOLERANCE)
    np.testing.assert_allclose(
        similarity(moments, "frobenius").numpy(), definitions.routed_frobenius(y, sent), **TOLERANCE
    )
    np.testing.assert_allclose(
        substitution_scale(moments).numpy(),
        definitions.routed(y, sent, definitions.scale),
        **TOLERANCE,
    )


@given(layers(), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_cka(layer: tuple[torch.Tensor, torch.Tensor, list[int]], block: int) -> None:
    outputs, _, _ = layer
    rows = torch.arange(outputs.shape[1])[:, None]
    got = cka_matrix(lambda part: outputs[:, part[:, 0]], rows, CKA_MEASURES, block=block)
    for measure in CKA_MEASURES:
        expected = definitions.BY_NAME[measure](outputs.numpy())
        np.testing.assert_allclose(got[measure].numpy(), expected, **TOLERANCE, err_msg=measure)


@pytest.mark.parametrize("measure", MOMENT_MEASURES)
def test_a_similarity_is_what_a_profile_accepts(measure: str) -> None:
    outputs = torch.randn(6, 40, 8)
    outputs[2] = outputs[4]
    outputs[5] = 0  # an expert that says nothing
    routed = torch.rand(40, 6) < 0.5
    matrix = similarity(moments_of(outputs, routed, [40], "all"), measure)
    assert matrix.dtype == torch.float32 and matrix.shape == (6, 6)
    assert torch.equal(matrix, matrix.T) and (matrix.diagonal() == 1).all()
    assert matrix.min() >= 0 and matrix.max() <= 1
    assert matrix[2, 4] == pytest.approx(1)


def test_identical_experts_are_fully_similar() -> None:
    outputs = torch.randn(1, 20, 4).expand(5, 20, 4)
    moments = moments_of(outputs, torch.ones(20, 5, dtype=torch.bool), [20], "all")
    assert (similarity(moments, "frobenius") == 1).all()


def test_cancellation_does_not_hide_a_small_distance() -> None:
    """Experts that differ by 1e-5 of a large common part, where float32 sums would see noise."""
    generator = torch.Generator().manual_seed(0)
    common = 1000 * torch.randn(1, 64, 16, generator=generator, dtype=torch.float64)
    outputs = common + 1e-2 * torch.randn(4, 64, 16, generator=generator, dtype=torch.float64)
    moments = moments_of(outputs, torch.ones(64, 4, dtype=torch.bool), [16] * 4, "all")
    np.testing.assert_allclose(
        similarity(moments, "frobenius").numpy(),
        definitions.frobenius(outputs.numpy()),
        rtol=1e-4,
        atol=1e-4,
    )
