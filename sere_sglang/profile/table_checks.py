"""What one table of a profile is held against; `where` names file and tensor.

Everything here raises `ProfileError`.
"""

from __future__ import annotations

import torch

from sere_sglang.errors import ProfileError
from sere_sglang.profile.container import Stored

MOST_EXPERTS = 4096


def check_dtype(where: str, stored: Stored, allowed: tuple[str, ...]) -> None:
    if stored.dtype not in allowed:
        names = {"F32": "float32", "BF16": "bfloat16", "F64": "float64", "I64": "int64",
                 "I32": "int32", "F16": "float16"}  # fmt: skip
        expected = " or ".join(names[a] for a in allowed)
        raise ProfileError(
            f"{where} is {names.get(stored.dtype, stored.dtype)}; expected {expected}; "
            "calibrate again"
        )


def square(where: str, stored: Stored) -> torch.Tensor:
    if len(stored.shape) == 2 and stored.shape[0] != stored.shape[1]:
        raise misshapen(where, stored, "[E, E]")
    return shaped(where, stored, "[E, E]", 2)


def shaped(
    where: str, stored: Stored, expected: str, dimensions: int, *, of_experts: bool = True
) -> torch.Tensor:
    """`stored`, without an empty dimension. of_experts: no dimension is of something larger."""
    if len(stored.shape) != dimensions or not all(stored.shape):
        raise misshapen(where, stored, expected)
    if of_experts and max(stored.shape) > MOST_EXPERTS:
        raise ProfileError(
            f"{where} has shape {list(stored.shape)}; no model has more than {MOST_EXPERTS} "
            "experts; calibrate again"
        )
    return stored.tensor()


def misshapen(where: str, stored: Stored, expected: str) -> ProfileError:
    return ProfileError(
        f"{where} has shape {list(stored.shape)}; expected {expected}; calibrate again"
    )


def check_values(where: str, values: torch.Tensor, low: float, high: float) -> None:
    for what, bad in (
        ("NaN", values.isnan()),
        ("infinity", values.isinf()),
        (_outside(low, high), ~((values >= low) & (values <= high))),
    ):
        if bad.any():
            place = bad.nonzero()[0].tolist()
            raise ProfileError(
                f"{where} holds {what} ({values[tuple(place)].item():g} at {place}, "
                f"{int(bad.sum())} in all); calibrate again"
            )


def numbers(
    where: str,
    stored: Stored,
    dtypes: tuple[str, ...],
    expected: str,
    dimensions: int,
    low: float,
    high: float,
) -> torch.Tensor:
    """A copy of `stored`, all of whose values lie in [low, high]."""
    check_dtype(where, stored, dtypes)
    values = shaped(where, stored, expected, dimensions)
    check_values(where, values, low, high)
    return values.clone()


def _outside(low: float, high: float) -> str:
    return f"a value outside [{low:g}, {high:g}]"


def check_some(where: str, values: torch.Tensor) -> None:
    if not values.double().sum() > 0:
        raise ProfileError(f"{where} is 0 throughout; calibrate again")
