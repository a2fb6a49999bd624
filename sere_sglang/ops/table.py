"""What one layer's re-routing looks up: the similarity matrix and what is derived from it."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_EXPERTS = 1024


class LayerTable(NamedTuple):
    """One layer's tables, all contiguous and on the device of the ids they will meet.

    similarity: float32 ``[E, E]``, row i holds M[i, :], finite.
    neighbors: int16 ``[E, E]`` or None; row i lists every expert by M[i, .] descending, lowest id
        first on a tie, so the best primary of i is the first of them that is in P.
    scale: float32 ``[E, E]`` or None; a slot that moves from e to j has its weight multiplied by
        ``scale[e, j]``.
    """

    similarity: torch.Tensor
    neighbors: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.similarity.shape[0]

    @staticmethod
    def build(
        similarity: torch.Tensor,
        scale: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> LayerTable:
        """Check a layer's matrices and derive the neighbour lists (synchronizes; do it at load).

        Args:
            similarity: ``[E, E]``, any floating dtype; compared as float32.
            scale: ``[E, E]`` or None.
            device: where the table will live; default: where `similarity` is.

        Raises:
            ValueError: not square, shapes that differ, NaN or infinity, or more than 1024 experts.
        """
        _check_square("similarity", similarity)
        if similarity.shape[0] > MAX_EXPERTS:
            raise ValueError(f"at most {MAX_EXPERTS} experts are supported: {similarity.shape[0]}")
        if scale is not None:
            _check_square("scale", scale)
            if scale.shape != similarity.shape:
                raise ValueError(
                    f"scale is {list(scale.shape)}, similarity is {list(similarity.shape)}"
                )
        device = torch.device(device) if device is not None else similarity.device
        matrix = similarity.detach().to("cpu", torch.float32)
        order = torch.sort(matrix, dim=1, descending=True, stable=True).indices
        return LayerTable(
            similarity=matrix.contiguous().to(device),
            neighbors=order.to(torch.int16).contiguous().to(device),
            scale=None if scale is None else scale.detach().to(device, torch.float32).contiguous(),
        )


def _check_square(name: str, matrix: torch.Tensor) -> None:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} must be a square [E, E] matrix, got {list(matrix.shape)}")
    if not matrix.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {matrix.dtype}")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{name} contains NaN or infinity")
