"""What ``--sere-shadow`` concludes from the likeliest tokens of two runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sere_sglang.errors import SereError
from sere_sglang.patches.number_keys import flatten, unflatten
from sere_sglang.runtime.brake import Brake
from sere_sglang.schedule.settings import Limits
from sere_sglang.schedule.shadow import (
    MIN_REQUESTS,
    TOP,
    WINDOW,
    ShadowReport,
    ShadowWindow,
    divergence_at_least,
    taken_from,
)
from tests.schedule.toy_model import AUTO, TOP_K, settings

STEPS = 200


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def _top(log_probs: np.ndarray, k: int = TOP) -> tuple[np.ndarray, np.ndarray]:
    ids = np.argsort(-log_probs, axis=1)[:, :k]
    return ids, np.take_along_axis(log_probs, ids, 1)


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (np.exp(p) * (p - q)).sum(1)


def _pair(vocabulary: int, sharp: float, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(size=(STEPS, vocabulary)) * sharp
    return logits, logits + noise * rng.normal(size=logits.shape)


@pytest.mark.parametrize(("vocabulary", "sharp"), [(2000, 4.0), (2000, 1.0), (30, 1.0)])
@pytest.mark.parametrize("noise", [0.1, 0.5, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.5])
def test_never_more_than_the_divergence(
    vocabulary: int, sharp: float, noise: float, temperature: float
) -> None:
    exact, seen = _pair(vocabulary, sharp, noise)
    p, q = _log_softmax(exact), _log_softmax(seen)
    bound = divergence_at_least(_top(p), _top(_log_softmax(seen / temperature)), temperature)
    assert (bound >= 0).all() and (bound <= _kl(p, q) + 1e-9).all()


def test_close_where_the_likeliest_tokens_are_nearly_all() -> None:
    exact, seen = _pair(2000, 12.0, 0.6)
    p, q = _log_softmax(exact), _log_softmax(seen)
    found = divergence_at_least(_top(p), _top(q), 1.0).mean()
    assert 0.85 * _kl(p, q).mean() < found <= _kl(p, q).mean()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_all_tokens_listed_is_the_divergence_itself(temperature: float) -> None:
    exact, seen = _pair(TOP, 2.0, 0.7)
    p, q = _log_softmax(exact), _log_softmax(seen)
    bound = divergence_at_least(_top(p), _top(_log_softmax(seen / temperature)), temperature)
    np.testing.assert_allclose(bound, _kl(p, q), atol=1e-6)


def test_no_token_in_common() -> None:
    ids = np.arange(TOP)[None]
    log_probs = np.full((1, TOP), np.log(1 / TOP))
    far = divergence_at_least((ids, log_probs), (ids + TOP, log_probs), 0.7)
    assert far == 0, "nothing is known at another temperature"
    assert divergence_at_least((ids, log_probs), (ids + TOP, log_probs), 1.0) >= 0


def test_the_interval_holds_the_mean_and_needs_requests() -> None:
    rng = np.random.default_rng(0)
    counts = {"tokens": 7, "requests": 2, "failed": 0, "dropped": 1}
    window = ShadowWindow()
    assert window.report(counts) == ShadowReport(tokens=7, requests=2, dropped=1)
    for i in range(4 * MIN_REQUESTS):
        report = window.report(counts)
        assert (report.low, report.high) == (0, -1) or i >= MIN_REQUESTS
        level = rng.gamma(2.0, 0.5)  # of a request: its tokens hang together
        window.add(level * rng.exponential(0.1, size=int(rng.integers(10, 60))))
    report = window.report(counts)
    assert report.low < 0.1 < report.high and report.low < report.kl < report.high
    window.clear()
    assert window.report(counts).window_tokens == 0


def test_old_requests_are_forgotten() -> None:
    window = ShadowWindow()
    for _ in range(40):
        window.add(np.ones(WINDOW // 20))
    for _ in range(21):
        window.add(np.zeros(WINDOW // 20))
    report = window.report({})
    assert report.kl == 0 and WINDOW <= report.window_tokens < 1.1 * WINDOW


def test_a_report_reaches_a_scheduler_whole() -> None:
    report = ShadowReport(0.01, 0.005, 0.015, 300, 900, 40, 1, 2)
    ours, rest = unflatten(flatten(report.as_numbers()) | {"other": 1})
    assert taken_from(ours) == report and not ours and rest == {"other": 1}
    assert taken_from(ours) is None


def test_the_brake_waits_until_it_is_sure() -> None:
    brake = Brake()
    report = ShadowReport(kl=0.5, low=0.0, high=-1.0)
    allowed = settings(shadow=0.1, max_kl=0.1)
    assert not brake.pulls(report, allowed) and brake.pulled is None
    sure = dataclasses.replace(report, low=0.11, window_tokens=300)
    assert not brake.pulls(sure, settings(shadow=0.1)), "no brake was asked for"
    assert not brake.pulls(sure, dataclasses.replace(allowed, enabled=False))
    assert brake.pulls(sure, allowed) and "0.1" in str(brake.pulled)
    brake.release()
    assert brake.pulled is None


def test_a_brake_needs_a_shadow() -> None:
    with pytest.raises(SereError, match="max_kl needs shadow"):
        settings().updated({"max_kl": 0.1}, Limits(TOP_K, AUTO))
    on = settings().updated({"max_kl": 0.1, "shadow": 0.01}, Limits(TOP_K, AUTO))
    with pytest.raises(SereError, match="max_kl needs shadow"):
        on.updated({"shadow": 0.0}, Limits(TOP_K, AUTO))
    with pytest.raises(SereError, match="unknown key 'shadow_kl'"):
        on.updated({"shadow_kl": 0.0}, Limits(TOP_K, AUTO))
