"""What a loss costs: a budget's shares by layer, little where an error is large beside the residual
stream; and by expert, what its surrogate leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sere_sglang.profile.loss_shares import expert_loss, loss_shares

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


def _cost(energy: list[float], explained: list[float]) -> list[float]:
    served = torch.tensor(explained)
    tables = {
        "expert_energy": torch.tensor(energy),
        "surrogate_explained": torch.stack([torch.zeros_like(served), served]),
    }
    found = expert_loss(_layer() | tables)
    assert found is not None and found.dtype == torch.float32
    return found.tolist()


def test_an_expert_costs_what_its_surrogate_leaves() -> None:
    assert _cost([1.0, 1.0, 2.0, 4.0], [0.5, 0.5, 0.75, 0.25]) == pytest.approx(
        [0.5 / 1.125, 0.5 / 1.125, 0.5 / 1.125, 3.0 / 1.125]
    )
    assert _cost([1.0, 3.0], [-1.0, 0.5]) == pytest.approx(
        [2 / 1.75, 1.5 / 1.75]
    )  # worse than none


def test_nothing_is_lost_for_free() -> None:
    """Not what calibration never met, nor what it found to be explained altogether."""
    assert _cost([0.0, 2.0, 2.0], [0.0, 0.5, 0.5]) == pytest.approx([1.0, 1.0, 1.0])
    well, badly = _cost([1.0, 1.0], [1.0, 0.0])
    assert well / badly == pytest.approx(1 / 32)  # a sixteenth of the mean, which is half
    assert _cost([0.0, 0.0], [0.0, 0.0]) == [1.0, 1.0]
    assert _cost([1.0, 1.0], [1.0, 1.0]) == [1.0, 1.0]


@pytest.mark.parametrize("missing", ["surrogate_explained", "expert_energy"])
def test_without_surrogates_nothing_is_weighed(missing: str) -> None:
    silent = _layer()
    del silent[missing]
    assert expert_loss(silent) is None
