"""The measures written out from their definitions: every pair, every output, float64.

outputs: [E, T, H] of one layer; nothing of sere_sglang is used here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Pair = Callable[[np.ndarray, np.ndarray], float]


def frobenius(outputs: np.ndarray) -> np.ndarray:
    distance = _pairwise(outputs, lambda x, y: float(np.linalg.norm(x - y)))
    largest = distance.max()
    matrix = 1 - distance / largest if largest > 0 else np.ones_like(distance)
    np.fill_diagonal(matrix, 1)
    return matrix


def cosine(outputs: np.ndarray) -> np.ndarray:
    def pair(x: np.ndarray, y: np.ndarray) -> float:
        norms = [np.maximum(np.linalg.norm(v, axis=1), 1e-8) for v in (x, y)]
        return (float(np.mean((x * y).sum(1) / norms[0] / norms[1])) + 1) / 2

    return _one_diagonal(_pairwise(outputs, pair))


def residual(outputs: np.ndarray) -> np.ndarray:
    """1 - min over c of |x - c y|^2 / |x|^2."""

    def pair(x: np.ndarray, y: np.ndarray) -> float:
        best = (x * y).sum() / (y * y).sum()
        return 1 - float(((x - best * y) ** 2).sum() / (x * x).sum())

    return _one_diagonal(_pairwise(outputs, pair))


def scale(outputs: np.ndarray) -> np.ndarray:
    def pair(x: np.ndarray, y: np.ndarray) -> float:
        solution, *_ = np.linalg.lstsq(y.reshape(-1, 1), x.ravel(), rcond=None)
        return float(solution[0])

    return _pairwise(outputs, pair)


def cka(outputs: np.ndarray) -> np.ndarray:
    return _cka(outputs, lambda x: x @ x.T)


def cka_polynomial(outputs: np.ndarray) -> np.ndarray:
    return _cka(outputs, lambda x: (x @ x.T + 1) ** 2)


def cka_rbf(outputs: np.ndarray) -> np.ndarray:
    def kernel(x: np.ndarray) -> np.ndarray:
        squared = ((x[:, None, :] - x[None, :, :]) ** 2).sum(-1)
        variance = squared.var(ddof=1)
        return np.exp(-squared / (2 * variance)) if variance > 1e-8 else np.ones_like(squared)

    return _cka(outputs, kernel)


BY_NAME = {
    "frobenius": frobenius,
    "cosine": cosine,
    "residual": residual,
    "cka": cka,
    "cka-rbf": cka_rbf,
    "cka-polynomial": cka_polynomial,
}


def routed(
    outputs: np.ndarray, sent: np.ndarray, definition: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """`definition` of each pair over the tokens sent to one of the two (all when none is).

    Only for measures that look at one pair at a time. sent: bool [T, E].
    """
    experts = len(outputs)
    matrix = np.zeros((experts, experts))
    for i in range(experts):
        for j in range(experts):
            tokens = sent[:, i] | sent[:, j]
            if not tokens.any():
                tokens[:] = True
            matrix[i, j] = definition(outputs[[i, j]][:, tokens])[0, 1] if i != j else 1
    return matrix


def routed_frobenius(outputs: np.ndarray, sent: np.ndarray) -> np.ndarray:
    """Root mean square distance over the pair's tokens, divided by the largest of all pairs."""
    experts = len(outputs)
    distance = np.zeros((experts, experts))
    for i in range(experts):
        for j in range(experts):
            tokens = sent[:, i] | sent[:, j]
            if not tokens.any():
                tokens[:] = True
            difference = outputs[i][tokens] - outputs[j][tokens]
            distance[i, j] = np.sqrt((difference**2).sum() / tokens.sum())
    largest = distance.max()
    return 1 - distance / largest if largest > 0 else np.ones_like(distance)


def _cka(outputs: np.ndarray, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    tokens = outputs.shape[1]
    centring = np.eye(tokens) - 1 / tokens
    grams = [centring @ kernel(x) @ centring for x in outputs]

    def pair(k: np.ndarray, m: np.ndarray) -> float:
        bottom = max(np.sqrt((k * k).sum() * (m * m).sum()), 1e-12)
        return float(np.clip((k * m).sum() / bottom, 0, 1))

    return _one_diagonal(_pairwise(np.stack(grams), pair))


def _pairwise(items: np.ndarray, pair: Pair) -> np.ndarray:
    return np.array([[pair(x, y) for y in items] for x in items])


def _one_diagonal(matrix: np.ndarray) -> np.ndarray:
    np.fill_diagonal(matrix, 1)
    return matrix
