"""The tables of surrogates: what stands in for an expert that a batch does not load.

Expert e of a layer has b_e + U_e V_e^T x, x the layer's input.

    surrogate_in         [E, r, H]  bfloat16, V^T; absent where every expert has its mean or nothing
    surrogate_out        [E, r, H]  bfloat16, U^T; rows behind an expert's own rank are 0 in both
    surrogate_bias       [E, H]     bfloat16, b
    surrogate_ranks      [R]        int64, ascending: the ranks that were evaluated
    surrogate_explained  [R + 3, E] float32, at most 1: held-out share of the energy of an expert's
                                    output on its own tokens that is explained by the best multiple
                                    of another expert; by the mean; by the best surrogate of at most
                                    each of the ranks; by what the file holds
    expert_energy        [E]        float32, mean |y|^2 of an expert's output per token of its own
    expert_bytes         [E]        int64, of its weights

A layer has either `surrogate_bias` with all of the last four, or none of these. r may differ by
layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sere_sglang.errors import ProfileError
from sere_sglang.profile.container import Stored
from sere_sglang.profile.table_checks import check_dtype, check_values, numbers, shaped

_FINITE = torch.finfo(torch.float32).max
_LARGEST = 1 << 53
_ROWS_BESIDE_RANKS = 3  # best other expert, mean; what the file holds
_FACTORS = ("surrogate_in", "surrogate_out")
_ALWAYS = (
    "surrogate_bias",
    "surrogate_ranks",
    "surrogate_explained",
    "expert_energy",
    "expert_bytes",
)


def check_surrogates(
    where: str, tables: Mapping[str, torch.Tensor], experts: int, hidden_size: int
) -> None:
    """Raise `ProfileError` unless one layer's tables agree.

    Args:
        where: names file and layer.
        tables: all tables of the layer; without surrogates there is nothing to check.
        experts: E of its similarity.
        hidden_size: H of the metadata, 0 when unknown.
    """
    if not SURROGATE_CHECKS.keys() & tables.keys():
        return
    both = [name for name in _FACTORS if name in tables]
    missing = [n for n in (*_ALWAYS, *(_FACTORS if both else ())) if n not in tables]
    if missing:
        raise ProfileError(f"{where} has surrogates but no {missing[0]}; calibrate again")
    hidden = hidden_size or tables["surrogate_bias"].shape[-1]
    rank = tables[both[0]].shape[1] if both else 0
    ranks = len(tables["surrogate_ranks"])
    expected = {
        "surrogate_in": (experts, rank, hidden),
        "surrogate_out": (experts, rank, hidden),
        "surrogate_bias": (experts, hidden),
        "surrogate_ranks": (ranks,),
        "surrogate_explained": (ranks + _ROWS_BESIDE_RANKS, experts),
        "expert_energy": (experts,),
        "expert_bytes": (experts,),
    }
    for name, shape in expected.items():
        if name in tables and tables[name].shape != shape:
            raise ProfileError(
                f"{where}.{name} has shape {list(tables[name].shape)}; with {experts} experts, "
                f"hidden size {hidden} and the layer's other tables it is {list(shape)}; "
                "calibrate again"
            )
    largest = int(tables["surrogate_ranks"].max())
    if max(rank, largest) > hidden:
        raise ProfileError(
            f"{where} has surrogates of rank {max(rank, largest)}, above its hidden size {hidden}; "
            "calibrate again"
        )


def _factor(where: str, stored: Stored) -> torch.Tensor:
    return _finite(where, stored, "[E, r, H]", 3)


def _bias(where: str, stored: Stored) -> torch.Tensor:
    return _finite(where, stored, "[E, H]", 2)


def _finite(where: str, stored: Stored, expected: str, dimensions: int) -> torch.Tensor:
    check_dtype(where, stored, ("BF16",))
    table = shaped(where, stored, expected, dimensions, of_experts=False)
    if not table.isfinite().all():  # says where; it takes more memory
        check_values(where, table.float(), -_FINITE, _FINITE)
    return table.clone()


def _ranks(where: str, stored: Stored) -> torch.Tensor:
    ranks = numbers(where, stored, ("I64", "I32"), "[R]", 1, 1, _LARGEST)
    if not (ranks.diff() > 0).all():
        raise ProfileError(f"{where} is not ascending: {ranks.tolist()[:16]}; calibrate again")
    return ranks


def _explained(where: str, stored: Stored) -> torch.Tensor:
    return numbers(where, stored, ("F32",), "[R + 3, E]", 2, -_FINITE, 1)


def _energy(where: str, stored: Stored) -> torch.Tensor:
    return numbers(where, stored, ("F32",), "[E]", 1, 0, _FINITE)


def _bytes(where: str, stored: Stored) -> torch.Tensor:
    return numbers(where, stored, ("I64",), "[E]", 1, 1, _LARGEST)


SURROGATE_CHECKS = {
    "surrogate_in": _factor,
    "surrogate_out": _factor,
    "surrogate_bias": _bias,
    "surrogate_ranks": _ranks,
    "surrogate_explained": _explained,
    "expert_energy": _energy,
    "expert_bytes": _bytes,
}
