"""How far every rule is from exact routing, layer by layer, as a calibration measured it.

Batches of held-out tokens go through one layer under each rule, all of them loading equally many
experts (`calibration.rule_fit`). Tables of a layer, format 1.4, C cells of batch size and degree:

    error_batch     [C] int64    rows of a batch
    error_active    [C] float32  experts loaded, as a share of what exact routing loads, in (0, 1]
    error_<name>    [C] float32  error of the layer's output, as a share of its energy; of each of
                                 `CANDIDATES` that this layer could be measured under
    energy_weights  [3] float32  `EnergyWeights`, in [0, 1]

A layer has all of the first two and ``error_similarity``, or none of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from sere_sglang.errors import ProfileError
from sere_sglang.names import SIMILARITY
from sere_sglang.profile.container import Stored
from sere_sglang.profile.table_checks import numbers

_FINITE = torch.finfo(torch.float32).max
_LEAST = 1e-12  # of an error whose logarithm is taken
_MOST_ROWS = 1 << 31


class EnergyWeights(NamedTuple):
    """Of rule ``energy`` in one layer. The defaults, for profiles that do not say, were measured on
    the demo model.

    fill: a, what the next best of a lost slot gets of the weight that the router would give it.
    renormalize: gamma, how far a row that lost a slot is brought back to its sum. Both are of
        ``energy`` without surrogates; with them they are 0.
    compensation: what the surrogates' output is multiplied by.
    """

    fill: float = 0.5
    renormalize: float = 0.25
    compensation: float = 1.0


UNFITTED = EnergyWeights()


class Candidate(NamedTuple):
    """What ``--sere-rule auto`` chooses among."""

    rule: str
    surrogates: bool = False

    @property
    def table(self) -> str:
        return "error_surrogates" if self.surrogates else f"error_{self.rule}"

    def __str__(self) -> str:
        return f"{self.rule} with surrogates" if self.surrogates else self.rule


CANDIDATES = (
    Candidate(SIMILARITY),
    Candidate("piggyback"),
    Candidate("budget"),
    Candidate("energy"),
    Candidate("energy", surrogates=True),
)
_CELLS = ("error_batch", "error_active")
_NEEDED = (*_CELLS, CANDIDATES[0].table)


def energy_weights(tables: Mapping[str, torch.Tensor]) -> EnergyWeights:
    """Of one layer's tables."""
    fitted = tables.get("energy_weights")
    return UNFITTED if fitted is None else EnergyWeights(*fitted.tolist())


def rule_errors(
    tables: Mapping[int, Mapping[str, torch.Tensor]],
) -> dict[Candidate, dict[int, float]]:
    """Candidate -> layer -> geometric mean of its errors, best candidate first.

    tables: of a profile. Only candidates that every layer was measured under; none where a layer
    was not measured at all.
    """
    found = {
        candidate: {layer: _mean(own[candidate.table]) for layer, own in tables.items()}
        for candidate in CANDIDATES
        if tables and all(candidate.table in own for own in tables.values())
    }
    return dict(sorted(found.items(), key=lambda item: overall(item[1])))


def overall(errors: Mapping[int, float]) -> float:
    """Of all layers: the geometric mean, since each rule is judged against the others."""
    return _mean(torch.tensor(list(errors.values())))


def _mean(errors: torch.Tensor) -> float:
    return float(errors.double().clamp(min=_LEAST).log().mean().exp())


def check_rule_errors(where: str, tables: Mapping[str, torch.Tensor]) -> None:
    """Raise `ProfileError` unless one layer's tables agree. where: names file and layer."""
    own = sorted(name for name in RULE_CHECKS if name.startswith("error_") and name in tables)
    missing = [name for name in _NEEDED if name not in tables]
    if own and missing:
        raise ProfileError(f"{where} has {own[0]} but no {missing[0]}; calibrate again")
    for name in own:
        if len(tables[name]) != len(tables["error_batch"]):
            raise ProfileError(
                f"{where}.{name} is of {len(tables[name])} cells, error_batch of "
                f"{len(tables['error_batch'])}; calibrate again"
            )


def _batch(where: str, stored: Stored) -> torch.Tensor:
    return numbers(where, stored, ("I64",), "[C]", 1, 1, _MOST_ROWS)


def _active(where: str, stored: Stored) -> torch.Tensor:
    return numbers(where, stored, ("F32",), "[C]", 1, 0, 1)


def _error(where: str, stored: Stored) -> torch.Tensor:
    return numbers(where, stored, ("F32",), "[C]", 1, 0, _FINITE)


def _weights(where: str, stored: Stored) -> torch.Tensor:
    weights = numbers(where, stored, ("F32",), "[3]", 1, 0, 1)
    if len(weights) != len(EnergyWeights._fields):
        raise ProfileError(f"{where} has shape {[len(weights)]}; expected [3]; calibrate again")
    return weights


RULE_CHECKS = {
    "error_batch": _batch,
    "error_active": _active,
    **dict.fromkeys((candidate.table for candidate in CANDIDATES), _error),
    "energy_weights": _weights,
}
