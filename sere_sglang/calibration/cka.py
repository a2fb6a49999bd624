"""Centred kernel alignment between experts, in blocks of token pairs.

CKA(i, j) = <HK_iH, HK_jH> / (|HK_iH| |HK_jH|), K_i the kernel matrix [T, T] of expert i's outputs,
H the centring matrix. With s_i the row sums of K_i and S_i their total,
<HK_iH, HK_jH> = sum K_i K_j - 2/T s_i . s_j + S_i S_j / T^2, so blocks of K suffice.

Kernels are those of the SERE paper's public code, quirks included: rbf divides by twice the
variance of all squared distances, polynomial is (x . y + 1)^2, the result is clamped to [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from sere_sglang.calibration.measures import as_similarity

_KERNEL_OF = {"cka": "linear", "cka-rbf": "rbf", "cka-polynomial": "polynomial"}
_MIN_VARIANCE = 1e-8
_MIN_DENOMINATOR = 1e-12

_TILE = {"cpu": 128, "cuda": 512}  # on a CPU [E, tile, tile] is to stay in its cache

Outputs = Callable[[torch.Tensor], torch.Tensor]


def cka_matrix(
    outputs: Outputs, rows: torch.Tensor, measures: Sequence[str], *, block: int
) -> dict[str, torch.Tensor]:
    """CKA similarity of all experts over `rows`.

    Args:
        outputs: ``[n, H] -> [E, n, H]``, every expert's output for some rows.
        rows: ``[T, H]``, T >= 2.
        measures: of ``cka``, ``cka-rbf``, ``cka-polynomial``.
        block: rows whose outputs are held at once, twice (see `collection.cka_block`).

    Returns:
        measure -> float32 ``[E, E]``.
    """
    tokens = len(rows)
    if tokens < 2:
        raise ValueError(f"CKA needs at least 2 tokens, got {tokens}")
    kernels = {measure: _KERNEL_OF[measure] for measure in measures}
    if block >= tokens:
        everything = outputs(rows)  # fits: no expert runs twice
        outputs = lambda part: everything  # noqa: E731
    first = _FirstPass(outputs, rows, block) if kernels.keys() - {"cka-polynomial"} else None
    sums: dict[str, _KernelSums] = {}
    for tile in _tiles(outputs, rows, block):
        for measure, kernel in kernels.items():
            if kernel == "polynomial":
                values = tile.inner.square().add_(tile.inner, alpha=2)  # less 1
            elif kernel == "linear":
                assert first is not None
                centre = first.to_mean
                values = tile.inner - centre[:, tile.a, None] - centre[:, None, tile.b]
            else:
                assert first is not None
                values = _rbf(tile, first.variance)
            if measure not in sums:
                sums[measure] = _KernelSums(len(values), tokens, rows.device)
            sums[measure].add(tile.a, tile.b, values)
    return {measure: total.cka() for measure, total in sums.items()}


@dataclass(frozen=True)
class _Tile:
    """Tokens `a` against tokens `b`, a.start <= b.start: inner [E, a, b], norms |y|^2 [E, n]."""

    a: slice
    b: slice
    inner: torch.Tensor
    norms_a: torch.Tensor
    norms_b: torch.Tensor

    @property
    def times(self) -> int:
        """A tile off the diagonal stands for its mirror image too."""
        return 1 if self.a.start == self.b.start else 2

    def distances(self) -> torch.Tensor:
        """Squared distances [E, a, b]."""
        sums = self.norms_a[:, :, None] + self.norms_b[:, None, :]
        return sums.sub_(self.inner, alpha=2)


class _FirstPass:
    """What the kernels need to know of all tokens before they can be computed.

    to_mean: float64 [E, T], y(t) . mean y, which centres the linear kernel up to constants.
    variance: float64 [E], unbiased, of all T x T squared distances.
    """

    def __init__(self, outputs: Outputs, rows: torch.Tensor, block: int) -> None:
        tokens = len(rows)
        row_sums: torch.Tensor | None = None
        total = square = torch.zeros((), dtype=torch.float64, device=rows.device)
        for tile in _tiles(outputs, rows, block):
            if row_sums is None:
                row_sums = tile.inner.new_zeros(len(tile.inner), tokens)
            row_sums[:, tile.a] += tile.inner.sum(2)
            if tile.times == 2:
                row_sums[:, tile.b] += tile.inner.sum(1)
            distances = tile.distances()
            total = total + tile.times * distances.sum((1, 2))
            square = square + tile.times * distances.square_().sum((1, 2))
        assert row_sums is not None
        self.to_mean = row_sums / tokens
        count = tokens**2
        self.variance = (square - total.square() / count) / (count - 1)


class _KernelSums:
    """Sums over all entries of each expert's kernel matrix."""

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


def _rbf(tile: _Tile, variance: torch.Tensor) -> torch.Tensor:
    """Less 1, as is the polynomial kernel: centring removes it, and with it the cancellation."""
    # The paper's code takes all tokens as alike below that variance.
    factor = torch.where(variance > _MIN_VARIANCE, -0.5 / variance, 0.0)
    return tile.distances().mul_(factor[:, None, None]).expm1_()


def _tiles(outputs: Outputs, rows: torch.Tensor, block: int) -> Iterator[_Tile]:
    """Every unordered pair of tiles, once; experts run once per pair of blocks."""
    edge = _TILE.get(rows.device.type, 128)
    blocks = _slices(0, len(rows), block)
    for n, a in enumerate(blocks):
        y_a = _floats(outputs(rows[a]))
        norms_a = y_a.to(torch.float64).square().sum(2)
        for b in blocks[n:]:
            same = b is a
            y_b = y_a if same else _floats(outputs(rows[b]))
            norms_b = norms_a if same else y_b.to(torch.float64).square().sum(2)
            for i in _slices(0, y_a.shape[1], edge):
                for j in _slices(i.start if same else 0, y_b.shape[1], edge):
                    inner = torch.bmm(y_a[:, i], y_b[:, j].transpose(1, 2)).to(torch.float64)
                    yield _Tile(
                        slice(a.start + i.start, a.start + i.stop),
                        slice(b.start + j.start, b.start + j.stop),
                        inner,
                        norms_a[:, i],
                        norms_b[:, j],
                    )


def _floats(outputs: torch.Tensor) -> torch.Tensor:
    """What inner products of single tokens are taken in: they need no more than float32."""
    return outputs if outputs.dtype == torch.float64 else outputs.to(torch.float32)


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]
