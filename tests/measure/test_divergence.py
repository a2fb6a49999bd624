"""What is computed from log-probabilities, against definitions; and which rank writes them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sere_sglang.errors import SereError
from sere_sglang.measure.divergence import divergence, mean_kl, perplexity
from sere_sglang.measure.forcing import TeacherForcing
from sere_sglang.measure.intervals import difference_interval, interval, share_interval
from sere_sglang.measure.routing import routing_of
from sere_sglang.measure.texts import as_many, cut_texts

SEQUENCES, STEPS, VOCAB = 3, 4, 5


def log_probs(seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SEQUENCES, STEPS, VOCAB, generator=generator).log_softmax(-1).numpy()


def test_divergence_by_its_definition() -> None:
    exact, seen = log_probs(0), log_probs(1)
    forced = [[1, 2, 3, 4], [0, 0, 1, 2], [4, 3, 2, 1]]
    found = divergence(exact, seen, forced)
    for s in range(SEQUENCES):
        for t in range(1, STEPS):
            p, q = exact[s, t].tolist(), seen[s, t].tolist()
            kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            assert found.kl[s, t - 1] == pytest.approx(kl, rel=1e-5)
            token = forced[s][t]
            assert found.delta_nll[s, t - 1] == pytest.approx(p[token] - q[token], rel=1e-5)
            assert found.agrees[s, t - 1] == (p.index(max(p)) == q.index(max(q)))
    assert mean_kl(exact, seen) == pytest.approx(found.kl.mean())
    chosen = [exact[s, t, forced[s][t]] for s in range(SEQUENCES) for t in range(1, STEPS)]
    assert perplexity(exact, forced) == pytest.approx(math.exp(-np.mean(chosen)), rel=1e-5)


def test_interval_covers_and_narrows() -> None:
    samples = np.random.default_rng(1).normal(1.0, 0.1, 200)
    low, high = interval(samples)
    assert low < 1.0 < high and high - low < 0.1
    wide = interval(samples[:8])
    assert wide[1] - wide[0] > high - low
    assert interval([2.0]) == (2.0, 2.0)


def test_intervals_of_shares_are_the_published_ones() -> None:
    """Wilson 1927, by scipy; Bonett and Price 2012, by their formula. No case is certain."""
    from scipy.stats import binomtest

    for right, asked in ((0, 10), (3, 10), (10, 10), (150, 200)):
        expected = binomtest(right, asked).proportion_ci(0.95, method="wilson")
        found = share_interval([1.0] * right + [0.0] * (asked - right))
        assert found == pytest.approx((expected.low, expected.high), abs=1e-4)
    low, high = difference_interval(np.zeros(100))
    assert low == pytest.approx(-high) and 0.02 < high < 0.04
    low, high = difference_interval(np.array([-1.0] * 12 + [1.0] * 2 + [0.0] * 86))
    assert (low, high) == pytest.approx((-0.1730, -0.0231), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("off", {"enabled": False}),
        ("S=2", {"policy": "static", "rule": "similarity", "primary_k": 2, "threshold": 0.0}),
        ("S=1/0.5", {"primary_k": 1, "threshold": 0.5}),
        ("adaptive", {"policy": "adaptive", "rule": "similarity"}),
        ("adaptive@0.05", {"policy": "adaptive", "quality_budget": 0.05}),
        ("auto@0.1", {"policy": "adaptive", "rule": "auto", "quality_budget": 0.1}),
        ("piggyback=2", {"policy": "static", "rule": "piggyback", "primary_k": 2}),
        ("energy=0.05", {"policy": "static", "rule": "energy", "quality_budget": 0.05}),
        ("budget=12", {"policy": "static", "rule": "budget", "max_experts": 12}),
    ],
)
def test_points_by_name(name: str, settings: dict[str, object]) -> None:
    routing = routing_of(name)
    assert routing.name == name and routing.settings is not None
    assert {key: routing.settings[key] for key in settings} == settings


@pytest.mark.parametrize("name", ["S=0", "S=0/0.5", "topk=0", "piggyback=00", "budget=0"])
def test_a_point_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(SereError, match=r"--points .*: a point has 1 at least; write S=2 or"):
        routing_of(name)


@pytest.mark.parametrize("name", ["S=", "s=2", "auto@", "S=2/x", "budget", "", "adaptive@1.2.3"])
def test_an_unknown_point_is_refused(name: str) -> None:
    with pytest.raises(SereError, match=r"--points .*: no such operating point; write S=2 or"):
        routing_of(name)


class _Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


def test_texts_are_cut_to_one_length() -> None:
    texts = cut_texts([[0, 1, 2, 3], [4, 5], [6, 7, 8]], _Letters(), 2, 1)
    assert [(t.prompt, t.prompt_ids, t.continuation_ids) for t in texts] == [
        ("ab", [0, 1], [2]),
        ("gh", [6, 7], [8]),
    ]
    assert as_many(texts, 3) == [*texts, texts[0]]


def test_one_rank_writes_and_all_force_the_same_token(tmp_path: Path) -> None:
    """Every rank of a server samples, with parameters of its own that came in one request."""
    forced = [2, 0]
    ranks = [
        [{"forced": forced, "record": str(tmp_path / f"{row}.f32")} for row in range(2)]
        for _ in range(2)
    ]
    steps = [torch.randn(2, VOCAB) for _ in forced]
    for step, logits in enumerate(steps):
        for parameters in ranks:
            out = TeacherForcing()(logits.clone(), parameters)
            assert out.argmax(-1).tolist() == [forced[step]] * 2
    for row in range(2):
        kept = np.fromfile(tmp_path / f"{row}.f32", dtype=np.float32).reshape(2, VOCAB)
        expected = np.stack([logits[row].log_softmax(-1).numpy() for logits in steps])
        np.testing.assert_allclose(kept, expected, rtol=1e-6)
