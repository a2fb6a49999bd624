"""What users got, compared with exact routing: the arithmetic of ``--sere-shadow``.

A finished request is scored again by a prefill, which is never re-routed. Both runs say which
tokens were likeliest at each step, which bounds the divergence between them from below, however
the request's tokens were chosen. docs/operating.md says what that is worth.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np

TOP = 20
"""Likeliest tokens that are compared at each step."""

WINDOW = 16384
"""Tokens that the estimate remembers."""

MIN_REQUESTS, MIN_TOKENS = 16, 256
"""Fewer say nothing: the interval is everything then."""

SURE = 4.0
"""Standard errors that the interval reaches to both sides."""

_PREFIX = "shadow_"
_LEAST = 1e-9  # of a share that float32 log-probabilities leave over


@dataclass(frozen=True)
class ShadowReport:
    """KL(exact || served) in nats per token, at least, of what users got under the settings in
    force; low, high: its interval, 0 and -1 while there is too little to say.

    window_tokens: of the estimate. tokens, requests: compared since the server started; failed,
    dropped: requests that could not be scored again, or had to make room.
    """

    kl: float = 0.0
    low: float = 0.0
    high: float = -1.0
    window_tokens: int = 0
    tokens: int = 0
    requests: int = 0
    failed: int = 0
    dropped: int = 0

    def as_numbers(self) -> dict[str, float]:
        """On the way to the schedulers; `taken_from` is the inverse."""
        return {_PREFIX + name: value for name, value in dataclasses.asdict(self).items()}


REPORT = {_PREFIX + f.name: f.type == "int" for f in dataclasses.fields(ShadowReport)}
"""Name of each number of a report on its way -> whether it is whole."""


def taken_from(changes: MutableMapping[str, Any]) -> ShadowReport | None:
    """The report among `changes`, whose keys are removed; None when there is none."""
    found = {name.removeprefix(_PREFIX): changes.pop(name) for name in REPORT if name in changes}
    return ShadowReport(**found) if found else None


def divergence_at_least(
    exact: tuple[np.ndarray, np.ndarray], seen: tuple[np.ndarray, np.ndarray], temperature: float
) -> np.ndarray:
    """Lower bound of KL(exact || seen) at every step, ``[steps]`` nats, from the likeliest tokens.

    Args:
        exact, seen: ids int ``[steps, k]`` and log-probabilities float64 ``[steps, k]`` of each
            run's likeliest tokens.
        temperature: that the log-probabilities of `seen` were divided by. With another than 1
            what is not among its likeliest tokens is not known, and only the tokens that both runs
            list are compared.
    """
    ids, p = exact
    same = ids[:, :, None] == seen[0][:, None, :]
    listed = same.any(axis=2)
    q = np.where(same, seen[1][:, None, :], 0.0).sum(axis=2)
    if temperature != 1.0:
        return _among_listed(p, temperature * q, listed)
    # A token that only the exact run lists is at most as likely as the least likely of the other's.
    q = np.where(listed, q, seen[1].min(axis=1, keepdims=True))
    rest_p = np.clip(1.0 - np.exp(p).sum(axis=1), _LEAST, None)
    rest_q = np.clip(1.0 - np.where(listed, np.exp(q), 0.0).sum(axis=1), _LEAST, None)
    bound = (np.exp(p) * (p - q)).sum(axis=1) + rest_p * (np.log(rest_p) - np.log(rest_q))
    return np.clip(bound, 0.0, None)


def _among_listed(p: np.ndarray, q: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Of the tokens that both list, each distribution taken as it is among those."""
    p, q = (np.where(listed, x, -np.inf) for x in (p, q))
    some = listed.any(axis=1)
    mass = np.exp(p).sum(axis=1)
    p, q = (x - np.log(np.where(some, np.exp(x).sum(axis=1), 1.0))[:, None] for x in (p, q))
    difference = np.where(listed, p, 0.0) - np.where(listed, q, 0.0)
    return np.clip(mass * (np.exp(p) * difference).sum(axis=1), 0.0, None)


class ShadowWindow:
    """The last requests that were compared, under the settings in force."""

    def __init__(self) -> None:
        self._scored: deque[tuple[int, float]] = deque()  # (tokens, sum of their divergence)
        self._tokens = 0

    def add(self, divergence: np.ndarray) -> None:
        """One request, ``[tokens]``; older ones go beyond `WINDOW` tokens."""
        self._scored.append((len(divergence), float(divergence.sum())))
        self._tokens += len(divergence)
        while self._tokens - self._scored[0][0] >= WINDOW:
            self._tokens -= self._scored.popleft()[0]

    def clear(self) -> None:
        self._scored.clear()
        self._tokens = 0

    def report(self, counts: Mapping[str, int]) -> ShadowReport:
        """counts: of everything since the start. The interval is over requests, for the tokens of
        one hang together: that of a ratio of two sums."""
        if not self._tokens:
            return ShadowReport(**counts)
        scored = np.array(self._scored)
        kl = float(scored[:, 1].sum() / self._tokens)
        known = ShadowReport(kl=kl, window_tokens=self._tokens, **counts)
        count = len(scored)
        if count < MIN_REQUESTS or self._tokens < MIN_TOKENS:
            return known
        squares = float(((scored[:, 1] - kl * scored[:, 0]) ** 2).sum())
        half = SURE * math.sqrt(squares * count / (count - 1)) / self._tokens
        return dataclasses.replace(known, low=max(kl - half, 0.0), high=kl + half)
