"""Centred kernel alignment between experts, in blocks of token pairs.

CKA(i, j) = <HK_iH, HK_jH> / (|HK_iH| |HK_jH|), K_i the kernel matrix [T, T] of expert i's outputs,
H the centring matrix. With s_i the row sums of K_i and S_i their total,
<HK_iH, HK_jH> = sum K_i K_j - 2/T s_i . s_j + S_i S_j / T^2, so blocks of K suffice.

Kernels are those of the SERE paper's public code, quirks included: rbf divides by twice the
variance of all squared distances, polynomial is (x . y + 1)^2, the result is clamped to [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from sere_sglang.profile.measures import as_similarity

_KERNEL_OF = {"cka": "linear", "cka-rbf": "rbf", "cka-polynomial": "polynomial"}
_MIN_VARIANCE = 1e-8
_MIN_DENOMINATOR = 1e-12


def cka_matrix(
    outputs: Callable[[torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    measures: Sequence[str],
    *,
    block: int,
) -> dict[str, torch.Tensor]:
    """CKA similarity of all experts over `rows`.

    Args:
        outputs: ``[n, H] -> [E, n, H]``, every expert's output for some rows.
        rows: ``[T, H]``, T >= 2.
        measures: of ``cka``, ``cka-rbf``, ``cka-polynomial``.
        block: rows per block (see `collection.cka_block`).

    Returns:
        measure -> float32 ``[E, E]``.
    """
    if len(rows) < 2:
        raise ValueError(f"CKA needs at least 2 tokens, got {len(rows)}")
    kernels = {measure: _KERNEL_OF[measure] for measure in measures}
    edge = min(block, len(rows))
    if edge == len(rows):
        everything = outputs(rows)  # fits: no expert runs twice
        outputs = lambda part: everything  # noqa: E731
    mean = _mean_output(outputs, rows, edge) if "linear" in kernels.values() else None
    variance = _distance_variance(outputs, rows, edge) if "rbf" in kernels.values() else None
    sums: dict[str, _KernelSums] = {}
    for a, b, y_a, y_b in _block_pairs(outputs, rows, edge):
        inner = torch.bmm(y_a, y_b.transpose(1, 2))
        for measure, kernel in kernels.items():
            if kernel == "linear":
                assert mean is not None
                centred = torch.bmm(y_a - mean, (y_b - mean).transpose(1, 2))
                values = centred
            elif kernel == "rbf":
                assert variance is not None
                values = _rbf(inner, y_a, y_b, variance)
            else:
                values = inner.square() + 2 * inner  # less 1
            if measure not in sums:
                sums[measure] = _KernelSums(len(y_a), len(rows), rows.device)
            sums[measure].add(a, b, values)
    return {measure: total.cka() for measure, total in sums.items()}


class _KernelSums:
    """Sums over all entries of each expert's kernel; a block off the diagonal counts twice."""

    def __init__(self, num_experts: int, num_tokens: int, device: torch.device) -> None:
        self.dot = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=device)
        self.row_sums = torch.zeros(num_experts, num_tokens, dtype=torch.float64, device=device)

    def add(self, a: slice, b: slice, values: torch.Tensor) -> None:
        flat = values.reshape(len(values), -1)
        twice = a.start != b.start
        self.dot += (flat @ flat.T) * (2 if twice else 1)
        self.row_sums[:, a] += values.sum(2)
        if twice:
            self.row_sums[:, b] += values.sum(1)

    def cka(self) -> torch.Tensor:
        tokens = self.row_sums.shape[1]
        totals = self.row_sums.sum(1)
        inner = self.dot - 2 / tokens * (self.row_sums @ self.row_sums.T)
        inner += torch.outer(totals, totals) / tokens**2
        norms = inner.diagonal().clamp(min=0)
        denominator = torch.outer(norms, norms).sqrt_().clamp_(min=_MIN_DENOMINATOR)
        return as_similarity(inner / denominator)


def _block_pairs(
    outputs: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, edge: int
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """Every unordered pair of blocks, with all experts' float64 outputs [E, edge, H] of each."""
    slices = [slice(i, min(i + edge, len(rows))) for i in range(0, len(rows), edge)]
    for n, a in enumerate(slices):
        y_a = outputs(rows[a]).to(torch.float64)
        for b in slices[n:]:
            yield a, b, y_a, y_a if b is a else outputs(rows[b]).to(torch.float64)


def _mean_output(
    outputs: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, edge: int
) -> torch.Tensor:
    """float64 [E, 1, H]: each expert's mean output, which centres the linear kernel exactly."""
    total = sum(outputs(part).to(torch.float64).sum(1, keepdim=True) for part in rows.split(edge))
    assert isinstance(total, torch.Tensor)
    return total / len(rows)


def _rbf(
    inner: torch.Tensor, y_a: torch.Tensor, y_b: torch.Tensor, variance: torch.Tensor
) -> torch.Tensor:
    """Less 1, as is the polynomial kernel: centring removes it, and with it the cancellation."""
    distances = _distances(inner, y_a, y_b)
    safe = variance.clamp(min=_MIN_VARIANCE)[:, None, None]
    values = torch.expm1(-distances / (2 * safe))
    return torch.where(variance[:, None, None] > _MIN_VARIANCE, values, 0.0)


def _distances(inner: torch.Tensor, y_a: torch.Tensor, y_b: torch.Tensor) -> torch.Tensor:
    """Squared distances [E, a, b]."""
    return y_a.square().sum(2)[:, :, None] + y_b.square().sum(2)[:, None, :] - 2 * inner


def _distance_variance(
    outputs: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, edge: int
) -> torch.Tensor:
    """float64 [E]: unbiased variance of all T x T squared distances of an expert's outputs."""
    zero = torch.zeros((), dtype=torch.float64, device=rows.device)
    total, square = zero, zero
    for a, b, y_a, y_b in _block_pairs(outputs, rows, edge):
        distances = _distances(torch.bmm(y_a, y_b.transpose(1, 2)), y_a, y_b)
        times = 1 if a is b else 2
        total = total + times * distances.sum((1, 2))
        square = square + times * distances.square().sum((1, 2))
    count = len(rows) ** 2
    return (square - total.square() / count) / (count - 1)
