"""What arguments of the ops are checked for; every refusal names the argument."""

from __future__ import annotations

import operator

import torch


def whole_number(name: str, value: object) -> int:
    """`value` as an int. Raises TypeError naming the argument."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    like: torch.Tensor,
    rows_apart: bool = False,
) -> None:
    """Raise ValueError, naming the argument, unless it is of that dtype and shape, where `like` is,
    and contiguous. rows_apart: with two dimensions, rows may lie further apart."""
    if tensor.dtype is not dtype or tensor.shape != shape:
        raise ValueError(
            f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )
    if tensor is not like and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, topk_ids on {like.device}")
    if tensor.is_contiguous():
        return
    if not rows_apart:
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        raise ValueError(f"{name} must have unit stride within a row, got {tensor.stride()}")
