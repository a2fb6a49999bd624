"""What re-routing did to the distributions of next tokens, along one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Divergence:
    """Of each sequence and decode step, ``[sequences, steps]`` float64: KL(exact || seen) and the
    forced token's negative log-likelihood beyond exact routing's, in nats; whether the most likely
    token is the same."""

    kl: np.ndarray
    delta_nll: np.ndarray
    agrees: np.ndarray


def divergence(
    exact: np.ndarray, seen: np.ndarray, continuations: Sequence[Sequence[int]]
) -> Divergence:
    """Compare log-probabilities ``[sequences, steps, vocab]`` along `continuations`.

    Step 0 comes from a prefill, which is never re-routed, and is left out.
    """
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for reference, other, forced in zip(exact, seen, continuations, strict=True):
        p, q = (x[1:].astype(np.float64) for x in (reference, other))  # a vocabulary is large
        tokens = np.asarray(forced)[1:, None]
        nll = np.take_along_axis(p, tokens, -1) - np.take_along_axis(q, tokens, -1)
        columns.append((_kl(p, q), nll[:, 0], p.argmax(-1) == q.argmax(-1)))
    return Divergence(*(np.stack(column) for column in zip(*columns, strict=True)))


def mean_kl(reference: np.ndarray, other: np.ndarray) -> float:
    """KL(reference || other) in nats, averaged over requests and decode steps (not step 0)."""
    pairs = zip(reference[:, 1:], other[:, 1:], strict=True)
    return float(np.mean([_kl(p.astype(np.float64), q.astype(np.float64)) for p, q in pairs]))


def perplexity(log_probs: np.ndarray, continuations: Sequence[Sequence[int]]) -> float:
    """Per-token perplexity of the held-out continuations over the decode steps."""
    tokens = np.asarray(continuations)[:, 1:, None]
    taken = np.take_along_axis(log_probs[:, 1:].astype(np.float64), tokens, axis=-1)
    return float(np.exp(-taken.mean()))


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """``[steps]``, of log-probabilities ``[steps, vocab]``."""
    return (np.exp(p) * (p - q)).sum(-1)
