"""``/set_internal_state`` and ``custom_params``: refused in a line, or whole and valid."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sere_sglang.config import live_settings
from sere_sglang.config_check import resolved
from sere_sglang.names import QUALITIES
from sere_sglang.options import SereConfig
from sere_sglang.patches.http_server import check, parse
from sere_sglang.patches.number_keys import PREFIX, flatten, unflatten
from sere_sglang.schedule.request_quality import KEY, QualityRules, RowClass
from sere_sglang.schedule.settings import Limits, Settings
from tests.fuzz.outcome import cases, outcome
from tests.schedule.toy_model import AUTO

TOP_K = 4
START = live_settings(resolved(SereConfig(moe_backend="sere", sere_rule="energy"), top_k=TOP_K))
STATE = {
    **dataclasses.asdict(START),
    "top_k": TOP_K,
    "auto_rule": dataclasses.asdict(AUTO),
    "unavailable_rules": {"budget": "of no use"},
    "num_experts": 16,
    "has_surrogates": False,
}

KEYS = st.one_of(
    st.sampled_from([*(f.name for f in dataclasses.fields(Settings)), "reset_counters", "stop"]),
    st.sampled_from(
        ["sere", "Sere", "sere.", "sere.primary_k", " sere ", "top_k", "__class__", ""]
    ),
    st.text(max_size=80),
)
NUMBERS = st.one_of(
    st.integers(-5, 70),
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 1 << 63, 1 << 64, 1e308, -0.0, math.nan, math.inf]),
)
LEAVES = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.sampled_from(
        ["static", "adaptive", "slo", "energy", "budget", "auto", "exact", "fast", "x" * 9000]
    ),
    st.text(max_size=80),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
CHANGES = st.dictionaries(KEYS, VALUES, max_size=4)
BODIES = st.one_of(
    st.builds(lambda c: {"server_args": {"sere": c}}, CHANGES),
    st.builds(lambda c: {"server_args": c}, CHANGES),
    st.builds(lambda c, d: {"server_args": {**d, "sere": c}}, CHANGES, CHANGES),
    VALUES,
)


def _receive(body: bytes) -> dict[str, Any]:
    """What the HTTP process does with it, and then a scheduler: the changes it would apply."""
    numbers, asked = parse(body)
    if asked is not None:
        check(asked, STATE)
        numbers |= flatten(asked)
    ours, rest = unflatten(json.loads(json.dumps(numbers)))
    assert not any(key.startswith(PREFIX) for key in rest)
    new = START.updated(ours, Limits.from_state(STATE))
    if asked is not None:
        assert new == START.updated(asked, Limits(TOP_K, AUTO)), (
            "a scheduler has what was asked for"
        )
    return ours


@given(body=BODIES)
@cases(200)
def test_bodies(body: Any) -> None:
    outcome(lambda: _receive(json.dumps(body).encode()))


@given(
    body=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "ignore"))
)
@cases(100)
def test_bodies_that_are_no_json(body: bytes) -> None:
    outcome(lambda: _receive(body))


@given(numbers=st.dictionaries(KEYS.map(lambda key: PREFIX + key), NUMBERS, max_size=4))
@cases(100)
def test_numbers_on_their_way_to_a_scheduler(numbers: dict[str, float]) -> None:
    """Even if somebody else put them there."""
    ours, _ = outcome(lambda: unflatten(numbers))
    if ours is not None:
        outcome(
            lambda: START.updated(
                {k: v for k, v in ours[0].items() if k != "stop"}, Limits(TOP_K, AUTO)
            )
        )


@given(
    params=st.one_of(
        VALUES,
        st.dictionaries(KEYS, VALUES, max_size=3),
        st.builds(lambda v: {KEY: v}, st.sampled_from(QUALITIES) | VALUES),
    ),
    allowed=st.lists(st.sampled_from(QUALITIES), min_size=1, unique=True),
)
@cases(200)
def test_custom_params(params: Any, allowed: list[str]) -> None:
    """Accepted: what is asked for is what the rows get, and nothing like a wish is overlooked."""
    rules = QualityRules(allowed[0], tuple(allowed))
    _, refusal = outcome(lambda: rules.check(params))
    got = rules.class_of(params)
    assert got.name.lower() in allowed
    if refusal is not None:
        return
    assert params is None or isinstance(params, dict)
    wishes = [key for key in params or {} if key.strip().lower() == KEY]
    assert wishes in ([], [KEY])
    asked = None if params is None else params.get(KEY)
    assert got is (RowClass[asked.upper()] if asked is not None else RowClass[allowed[0].upper()])


def test_a_wish_nested_too_deeply_is_refused_like_any_other() -> None:
    """Python refuses to show it, and SGLang's JSON reader does not refuse to read it."""
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [deep]
    rules = QualityRules("balanced", ("balanced", "exact"))
    for params in ({KEY: deep}, deep, {KEY: [10**9000]}):
        _, refusal = outcome(functools.partial(rules.check, params))
        assert refusal is not None and "too deep or long to show" in refusal and len(refusal) < 300


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, -(10**400), "x" * 9000])
def test_the_refusal_says_what_is_wrong_with_the_value(value: Any) -> None:
    body = json.dumps({"server_args": {"sere": {"threshold": value}}}).encode()
    _, refusal = outcome(lambda: _receive(body))
    assert refusal is not None and "every other key" not in refusal and len(refusal) < 200
