"""How a loss budget is shared among layers: little to those whose loss the model feels.

What a layer loses is an error beside the residual stream that it is added to, and the next norm
divides by the size of that stream. So a unit of lost routing weight, squared, costs

    relative = (mean squared weight of a row) (energy that the expert's surrogate leaves) / |x|^2

with |x|^2 of the residual stream behind the layer; on two models it foretells the KL that losing in
one layer alone causes within a factor of 2.5, where the layers differ by up to 34
(docs/quality.md). The ideal for losses that add up is a share of 1 / relative. It would have
the dearest layers lose almost nothing, which leaves too little to drop where much must be, and
trusts the estimate altogether: the power below is between that and equal shares.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

_POWER = 0.75
_NEEDED = ("stream_energy", "expert_energy", "surrogate_explained", "weight_by_rank")


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


def _relative(table: Mapping[str, torch.Tensor]) -> float:
    left = table["expert_energy"].double() * (1 - table["surrogate_explained"][-1].double())
    mass = float(table["weight_by_rank"].double().sum()) ** 2
    return float(left.mean()) * mass / float(table["stream_energy"])
