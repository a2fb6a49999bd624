"""Surrogates: what a token gets instead of an expert that its batch does not load.

One low-rank map per expert, fitted in calibration on that expert's own input and output.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch

from sere_sglang.ops.jit import BuildError, load_module

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "cpu", "torch")


@dataclass(frozen=True)
class Surrogates:
    """Of one layer's E experts; all bfloat16, contiguous, on one device.

    inward: V^T, ``[E, r, H]``; outward: U^T, ``[E, r, H]``; bias: ``[E, H]``. Expert e's output
    for x is about U_e V_e^T x + b_e.
    """

    inward: torch.Tensor
    outward: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def build(
        cls,
        inward: torch.Tensor,
        outward: torch.Tensor,
        bias: torch.Tensor,
        *,
        device: torch.device | str,
    ) -> Surrogates:
        """Raises `ValueError` for tensors that do not fit together."""
        if inward.dim() != 3 or inward.shape != outward.shape:
            raise ValueError(
                f"inward {list(inward.shape)} and outward {list(outward.shape)} must be [E, r, H]"
            )
        if list(bias.shape) != [inward.shape[0], inward.shape[2]]:
            raise ValueError(f"bias {list(bias.shape)} does not fit inward {list(inward.shape)}")
        if torch.device(device).type == "cpu":
            _native()  # compiled now: at its first use a server is decoding
        parts = (inward, outward, bias)
        return cls(*(part.to(device, torch.bfloat16).contiguous() for part in parts))

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * 2 for part in (self.inward, self.outward, self.bias))


@dataclass(frozen=True)
class Compensation:
    """What a layer's T rows lost, and what makes up for it.

    lost: float32 ``[T, E]``, `Routed.lost`. scale: 1 / n where n ranks add their outputs up.
    """

    lost: torch.Tensor
    surrogates: Surrogates
    scale: float = 1.0

    def check(self, rows: int, hidden_size: int) -> None:
        """Raises `ValueError` unless this is of a layer's input ``[rows, hidden_size]``."""
        experts, _, size = self.surrogates.inward.shape
        if size != hidden_size:
            raise ValueError(f"hidden must be [T, H={size}] as the surrogates, got H={hidden_size}")
        if list(self.lost.shape) != [rows, experts]:
            raise ValueError(f"lost must be {[rows, experts]}, got {list(self.lost.shape)}")
        if self.lost.dtype != torch.float32:
            raise ValueError(f"lost must be float32, got {self.lost.dtype}")

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """As the kernels in C++ take them."""
        of = self.surrogates
        return self.lost.contiguous(), of.inward, of.outward, of.bias, self.scale

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 ``[T, H]``: scale * sum over e of lost[t, e] * (U_e V_e^T hidden[t] + b_e)."""
        weights = self.lost * self.scale
        inner = torch.einsum("th,erh->ter", hidden.float(), self.surrogates.inward.float())
        inner *= weights[:, :, None]
        added = torch.einsum("ter,erh->th", inner, self.surrogates.outward.float())
        return added + weights @ self.surrogates.bias.float()


def compensate_(
    output: torch.Tensor, hidden: torch.Tensor, compensation: Compensation, *, impl: str = "auto"
) -> None:
    """output += compensation.of(hidden).

    Args:
        output: bfloat16 or float32 ``[T, H]``, the layer's; changed in place.
        hidden: the same dtype ``[T, H]``, the layer's input.
        compensation: of these rows.
        impl: ``cpu`` is compiled, ``torch`` runs on any device; ``auto`` is ``cpu`` for CPU tensors
            where it compiles.

    Raises:
        ValueError: arguments that do not fit.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is none of: {', '.join(IMPLEMENTATIONS)}")
    if output.dtype not in (torch.bfloat16, torch.float32) or hidden.dtype != output.dtype:
        raise ValueError(f"output is {output.dtype}, hidden {hidden.dtype}: one of them will do")
    if hidden.shape != output.shape or hidden.dim() != 2:
        raise ValueError(f"hidden must be {list(output.shape)}, got {list(hidden.shape)}")
    if not output.is_contiguous():
        raise ValueError("output must be contiguous")
    compensation.check(*hidden.shape)
    native = _native() if impl != "torch" and output.device.type == "cpu" else None
    if native is None and impl == "cpu":
        raise ValueError("impl 'cpu' serves CPU tensors, where a C++ compiler is")
    if native is None:
        output += compensation.of(hidden).to(output.dtype)
        return
    native(output, hidden.contiguous(), *compensation.operands)


@functools.cache
def _native() -> Any:
    try:
        return load_module("surrogates_cpu", ["surrogates_cpu.cpp"]).compensate
    except BuildError as error:
        logger.warning("the surrogates in C++ do not build, torch replaces them: %s", error)
        return None
