"""The energy of the residual stream, summed over a text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.layer_boundary.residual.add_norm import PLAIN_ADD
from sglang.srt.layers.layer_boundary.residual.stream import DeclaredSum, ResidualStream

from sere_sglang.calibration.collector import _stream_parts
from sere_sglang.calibration.stream import StreamEnergy, stream_energy


def test_is_the_geometric_mean_however_the_text_was_cut() -> None:
    rows = (
        torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 3, 60)[:, None]
    )
    whole, cut = StreamEnergy(), StreamEnergy()
    whole.add(rows.bfloat16())
    for part in rows.bfloat16().split(7):
        cut.add(part)
    assert all(torch.equal(whole.sums[name], cut.sums[name]) for name in whole.sums)
    found = stream_energy(whole.sums)
    assert found is not None and found.dtype == torch.float32 and found.shape == (1,)
    expected = rows.bfloat16().double().square().sum(1).log().mean().exp()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_zeros_are_no_tokens() -> None:
    sums = StreamEnergy()
    sums.add(torch.zeros(3, 8))
    assert stream_energy(sums.sums) is None and stream_energy({}) is None
    sums.add(torch.full((1, 8), 2.0))
    assert stream_energy(sums.sums) == torch.tensor([32.0])


def test_goes_on_where_it_was() -> None:
    first, second = StreamEnergy(), StreamEnergy()
    first.add(torch.ones(5, 8))
    second.restore(first.sums)
    assert second.sums == first.sums
    second.restore({})  # a partial file of before there was one
    assert second.sums == first.sums


def test_is_what_sglangs_decoder_layers_leave_behind() -> None:
    output, residual = torch.ones(3, 8), torch.full((3, 8), 2.0)

    def added(inputs: tuple[object, ...], result: object) -> torch.Tensor:
        return torch.stack(_stream_parts(inputs, result)).sum(0)

    assert torch.equal(added((), (output, residual)), output + residual)
    assert torch.equal(added((), (output, None)), output)
    assert torch.equal(added((), output), output)
    stream = ResidualStream(residual)
    batch = SimpleNamespace(residual_stream=stream)
    stream.record(output, PLAIN_ADD)
    assert torch.equal(added((batch,), output), output + residual)
    stream.pending = None
    stream.record(output, PLAIN_ADD, declared_sum=DeclaredSum(None))
    assert _stream_parts((batch,), output) == [], "ranks still owe each other a sum"
