"""Shares of a loss budget: little where an error is large beside the residual stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sere_sglang.profile.loss_shares import loss_shares

Tables = dict[int, dict[str, torch.Tensor]]


def _layer(
    *, energy: float = 1.0, explained: float = 0.5, stream: float = 1.0
) -> dict[str, torch.Tensor]:
    return {
        "expert_energy": torch.full((4,), energy),
        "surrogate_explained": torch.stack([torch.zeros(4), torch.full((4,), explained)]),
        "weight_by_rank": torch.tensor([0.7, 0.3]),
        "stream_energy": torch.tensor([stream]),
    }


def test_equal_layers_share_equally() -> None:
    assert loss_shares({0: _layer(), 5: _layer()}) == {0: 1.0, 5: 1.0}


@pytest.mark.parametrize(
    "dear",
    [
        _layer(energy=4.0),
        _layer(stream=0.25),
        _layer(explained=-1.0),
        _layer() | {"weight_by_rank": torch.tensor([1.4, 0.6])},
    ],
    ids=["energy", "stream", "explained", "weights"],
)
def test_a_loss_that_costs_four_times_as_much_gets_less(dear: dict[str, torch.Tensor]) -> None:
    shares = loss_shares({0: _layer(), 1: dear})
    assert np.mean(list(shares.values())) == pytest.approx(1.0)
    assert shares[0] / shares[1] == pytest.approx(4.0**0.75)


@pytest.mark.parametrize("missing", ["stream_energy", "expert_energy", "weight_by_rank"])
def test_one_layer_that_does_not_say_leaves_all_equal(missing: str) -> None:
    silent = _layer(energy=9.0)
    del silent[missing]
    assert loss_shares({0: _layer(), 1: silent}) == {0: 1.0, 1: 1.0}
    assert loss_shares({}) == {}


def test_an_expert_that_is_explained_altogether_takes_no_infinite_share() -> None:
    shares = loss_shares({0: _layer(), 1: _layer(explained=1.0)})
    assert np.isfinite(list(shares.values())).all() and shares[1] > shares[0] > 0
    assert loss_shares({0: _layer(energy=0.0), 1: _layer(energy=0.0)}) == {0: 1.0, 1: 1.0}
