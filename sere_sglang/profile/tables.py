"""What the tables of a profile must be: shapes, dtypes, ranges, sums.

    similarity, similarity_<measure>  [E, E] float32 or bfloat16, in [0, 1], 1 on the diagonal
    scale                             [E, E] float, finite
    popularity                        [E]    tokens that chose an expert, at least one; the sum
                                             over ranks of the next, where both are there
    popularity_by_rank                [K, E] the same by rank: every token fills every rank
    coactivation                      [E, E] tokens that chose both experts
    weight_by_rank                    [K]    float, root mean square routing weight of every rank
    stream_energy                     [1]    float, |x|^2 of a typical token in the residual stream
                                             behind the layer; with surrogates

those of surrogates (`profile.surrogate_tables`) and of the rules (`profile.rule_errors`).

A table of another name is of a later version, or somebody else's: nobody reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sere_sglang.errors import ProfileError
from sere_sglang.profile.container import Stored
from sere_sglang.profile.rule_errors import RULE_CHECKS, check_rule_errors
from sere_sglang.profile.surrogate_tables import SURROGATE_CHECKS, check_surrogates
from sere_sglang.profile.table_checks import (
    check_dtype,
    check_some,
    check_values,
    shaped,
    square,
)

_FLOATS = ("F32", "BF16", "F64")
_COUNTS = ("I64", "I32", "F32", "F64")
_LARGEST = 1e15  # of a count; float64 still tells its neighbours apart
_HEAVIEST = 1e6  # of a routing weight
_TOLERANCE = 1e-3  # of sums that are equal, where somebody stores shares instead of counts


def is_known(table: str) -> bool:
    return table in _CHECKS or table.startswith("similarity_")


def read_table(where: str, table: str, stored: Stored) -> torch.Tensor:
    """One checked table; `where` names file and tensor. Raises `ProfileError`."""
    return _CHECKS.get(table, _similarity)(where, stored)


def check_together(
    path: object, similarity: Mapping[int, torch.Tensor],
    tables: Mapping[int, Mapping[str, torch.Tensor]], top_k: int, hidden_size: int,
) -> None:  # fmt: skip
    """Raise `ProfileError` unless all layers agree about E, K and H.

    top_k, hidden_size: 0 when unknown.
    """
    sizes = {layer: matrix.shape[0] for layer, matrix in similarity.items()}
    if len(set(sizes.values())) > 1:
        raise ProfileError(f"{path}: layers disagree about the number of experts: {sizes}")
    stray = sorted(tables.keys() - similarity.keys())
    if stray:
        raise ProfileError(
            f"{path}: layer {stray[0]} has tables but no similarity; calibrate again"
        )
    experts = next(iter(sizes.values()))
    if top_k > experts:
        raise ProfileError(
            f"{path}: metadata top_k {top_k} is more than its {experts} experts; calibrate again"
        )
    ranks, said_by = top_k, "metadata top_k"
    for layer, named in sorted(tables.items()):
        counts, by_rank = named.get("popularity"), named.get("popularity_by_rank")
        check_surrogates(f"{path}: layers.{layer}", named, experts, hidden_size)
        check_rule_errors(f"{path}: layers.{layer}", named)
        for name, table in sorted(named.items()):
            if name in SURROGATE_CHECKS or name in RULE_CHECKS or name == "stream_energy":
                continue
            where = f"layers.{layer}.{name}"
            if name != "weight_by_rank" and table.shape[-1] != experts:
                raise ProfileError(
                    f"{path}: {where} is of {table.shape[-1]} experts, similarity of {experts}; "
                    "calibrate again"
                )
            if not name.endswith("_by_rank"):
                continue
            if ranks and table.shape[0] != ranks:
                raise ProfileError(
                    f"{path}: {where} has {table.shape[0]} ranks, {said_by} {ranks}; "
                    "calibrate again"
                )
            ranks, said_by = (table.shape[0], where) if not ranks else (ranks, said_by)
        if counts is not None and by_rank is not None:
            total = by_rank.double().sum(0)
            if (total - counts.double()).abs().max() > _TOLERANCE * total.sum():
                raise ProfileError(
                    f"{path}: layers.{layer}.popularity is not the sum over ranks of "
                    "popularity_by_rank; calibrate again"
                )


def _similarity(where: str, stored: Stored) -> torch.Tensor:
    check_dtype(where, stored, ("F32", "BF16"))
    matrix = square(where, stored).float()
    check_values(where, matrix, 0, 1)
    if not (matrix.diagonal() == 1).all():
        i = int((matrix.diagonal() != 1).nonzero()[0])
        raise ProfileError(
            f"{where}: expert {i} is {matrix[i, i].item():g} similar to itself, not 1; "
            "calibrate again"
        )
    # A tensor of its own: it stays while a server runs, the file's bytes do not.
    return matrix.clone()


def _scale(where: str, stored: Stored) -> torch.Tensor:
    check_dtype(where, stored, _FLOATS)
    matrix = square(where, stored)
    check_values(where, matrix, -torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    return matrix.clone()


def _coactivation(where: str, stored: Stored) -> torch.Tensor:
    check_dtype(where, stored, _COUNTS)
    matrix = square(where, stored)
    check_values(where, matrix, 0, _LARGEST)
    return matrix.clone()


def _popularity(where: str, stored: Stored) -> torch.Tensor:
    check_dtype(where, stored, _COUNTS)
    counts = shaped(where, stored, "[E]", 1)
    check_values(where, counts, 0, _LARGEST)
    check_some(where, counts)
    return counts.clone()


def _popularity_by_rank(where: str, stored: Stored) -> torch.Tensor:
    check_dtype(where, stored, _COUNTS)
    counts = shaped(where, stored, "[K, E]", 2)
    check_values(where, counts, 0, _LARGEST)
    for rank, row in enumerate(counts):
        check_some(f"{where}, rank {rank},", row)
    tokens = counts.double().sum(1)
    uneven = (tokens - tokens[0]).abs() > _TOLERANCE * tokens[0]
    if uneven.any():
        rank = int(uneven.nonzero()[0])
        raise ProfileError(
            f"{where} counts {tokens[0]:g} tokens at rank 0 and {tokens[rank]:g} at rank {rank}; "
            "calibrate again"
        )
    return counts.clone()


def _stream_energy(where: str, stored: Stored) -> torch.Tensor:
    check_dtype(where, stored, _FLOATS)
    energy = shaped(where, stored, "[1]", 1, of_experts=False)
    check_values(where, energy, 0, torch.finfo(torch.float32).max)
    check_some(where, energy)
    return energy.clone()


def _weight_by_rank(where: str, stored: Stored) -> torch.Tensor:
    check_dtype(where, stored, _FLOATS)
    weights = shaped(where, stored, "[K]", 1)
    check_values(where, weights, 0, _HEAVIEST)
    check_some(where, weights)
    return weights.clone()


_CHECKS = {
    "similarity": _similarity,
    "scale": _scale,
    "popularity": _popularity,
    "popularity_by_rank": _popularity_by_rank,
    "coactivation": _coactivation,
    "weight_by_rank": _weight_by_rank,
    "stream_energy": _stream_energy,
    **SURROGATE_CHECKS,
    **RULE_CHECKS,
}
