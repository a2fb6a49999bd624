"""What a loss costs, by layer and expert: a budget is spent where the model feels it least.

What a layer loses is an error beside the residual stream that it is added to, and the next norm
divides by the size of that stream. So a unit of lost routing weight, squared, costs

    relative = (mean squared weight of a row) (energy that the expert's surrogate leaves) / |x|^2

with |x|^2 of the residual stream behind the layer; on two models it foretells the KL that losing in
one layer alone causes within a factor of 2.5, where the layers differ by up to 34
(docs/quality.md). The ideal for losses that add up is a share of 1 / relative. It would have
the dearest layers lose almost nothing, which leaves too little to drop where much must be, and
trusts the estimate altogether: the power below is between that and equal shares.

Within a layer, a unit costs by expert what the expert's surrogate leaves of its output.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

_POWER = 0.75
_LEAST = 1 / 16
"""Of the mean: a surrogate that leaves less in calibration is not trusted further."""
_OF_EXPERTS = ("expert_energy", "surrogate_explained")
_NEEDED = (*_OF_EXPERTS, "stream_energy", "weight_by_rank")


def loss_shares(tables: Mapping[int, Mapping[str, torch.Tensor]]) -> dict[int, float]:
    """Layer -> what its loss budget is multiplied by; the mean over the layers is 1.

    tables: of a profile. All are 1 where one layer does not say what its loss costs.
    """
    ids = sorted(tables)
    if not ids or any(name not in tables[layer] for layer in ids for name in _NEEDED):
        return dict.fromkeys(ids, 1.0)
    relative = np.array([_relative(tables[layer]) for layer in ids])
    shares = np.maximum(relative, max(relative.max() * 1e-6, 1e-30)) ** -_POWER
    return dict(zip(ids, (shares / shares.mean()).tolist(), strict=True))


def expert_loss(table: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """float32 ``[E]``, 1 in the mean: what a unit of an expert's squared weight costs in a layer
    whose surrogates are served; 1 for experts that calibration did not meet. None without
    surrogates: then weighing experts by what they put out was no gain (docs/quality.md).

    table: of a profile's layer.
    """
    if any(name not in table for name in _OF_EXPERTS):
        return None
    left = _left(table)
    met = table["expert_energy"] > 0
    mean = left[met].mean() if bool((left[met] > 0).any()) else left.new_tensor(1.0)
    cost = (left / mean).clamp(min=_LEAST).where(met, 1.0)
    return (cost / cost.mean()).float()


def _left(table: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float64 ``[E]``: energy of an expert's output that its surrogate leaves."""
    return table["expert_energy"].double() * (1 - table["surrogate_explained"][-1].double())


def _relative(table: Mapping[str, torch.Tensor]) -> float:
    mass = float(table["weight_by_rank"].double().sum()) ** 2
    return float(_left(table).mean()) * mass / float(table["stream_energy"])
