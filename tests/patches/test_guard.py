"""The guard around every hook, without a server: whose error it is, and what runs instead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.errors import SereError
from sere_sglang.options import SereConfig
from sere_sglang.patches.guard import HOOKS, Guarded
from sere_sglang.patches.number_keys import unflatten
from sere_sglang.runtime import process, shown
from sere_sglang.runtime.rank import SereRuntime
from sere_sglang.runtime.service import Service
from sere_sglang.schedule.composition import BatchComposition
from tests.runtime.one_rank import one_rank


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> Iterator[SereRuntime]:
    """The runtime of a scheduler that serves, its layers being there without a model."""
    made = one_rank(SereConfig(moe_backend="sere"))
    monkeypatch.setattr(process, "_current", made)
    made.serve(Service())
    made.end_forward()  # of a warm-up, in which every layer ran
    known = len(HOOKS)
    yield made
    del HOOKS[known:]


def hooked(function: Callable[..., Any], kind: HookType, **options: Any) -> Guarded:
    return Guarded("a hook", function, kind, **options)


class Original:
    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error = error

    def __call__(self, *args: Any) -> str:
        self.calls.append(args)
        if self.error is not None:
            raise self.error
        return "SGLang's"


def before_it(original: Original, value: int) -> str:
    raise ZeroDivisionError


def after_it(original: Original, value: int) -> str:
    original(value + 1)
    raise ZeroDivisionError


@pytest.mark.parametrize(("hook", "given"), [(before_it, 1), (after_it, 2)])
def test_sglangs_function_runs_once(
    active: SereRuntime, hook: Callable[..., Any], given: int, caplog: pytest.LogCaptureFixture
) -> None:
    original, guarded = Original(), hooked(hook, HookType.AROUND)
    with caplog.at_level(logging.WARNING):
        assert guarded(original, 1) == "SGLang's"
    assert original.calls == [(given,)]
    assert active.health.failed == "a hook: ZeroDivisionError: "
    (told,) = caplog.records
    assert told.exc_info is not None and '{"enabled": true}' in told.getMessage()
    # From now on as if the hook were not there.
    assert guarded(original, 1) == "SGLang's" and original.calls[1:] == [(1,)]
    assert len(caplog.records) == 1


def test_sglangs_own_errors_pass_untouched(active: SereRuntime) -> None:
    error = KeyError("theirs")

    def cleans_up(original: Original) -> str:
        try:
            return original()
        finally:
            raise ZeroDivisionError

    passes = hooked(lambda original: original(), HookType.AROUND)
    for hook, failed in ((passes, False), (hooked(cleans_up, HookType.AROUND), True)):
        original = Original(error)
        with pytest.raises(KeyError) as seen:
            hook(original)
        assert seen.value is error and len(original.calls) == 1
        assert (active.health.failed is not None) == failed


def test_before_and_after_count_as_absent(active: SereRuntime) -> None:
    def fails(*_args: Any) -> None:
        raise ZeroDivisionError

    assert hooked(fails, HookType.BEFORE)(1) is None
    assert active.health.failed is not None
    otherwise = hooked(fails, HookType.AFTER, runs="always", otherwise=lambda result: result + 1)
    assert otherwise(1) == 2


def test_a_refusal_is_no_failure(active: SereRuntime) -> None:
    def refuses(*_args: Any) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        hooked(refuses, HookType.BEFORE, deliberate=(LookupError,))()
    assert active.health.failed is None


@pytest.mark.parametrize("warms_up", [True, False])
def test_a_model_that_cannot_be_re_routed(active: SereRuntime, warms_up: bool) -> None:
    """Noticed by the first forward: the warm-up's stops the start, a request's does not."""
    active.serve(Service(warms_up=warms_up))
    active.binding.stages[0].ran = True  # and no other
    active.last = BatchComposition("decode", decode_tokens=1)

    def forward(original: Original) -> str:
        try:
            return original()
        finally:
            active.end_forward()

    guarded, original = hooked(forward, HookType.AROUND), Original()
    if warms_up:
        with pytest.raises(SereError):
            guarded(original)
        assert active.health.failed is None
    else:
        assert guarded(original) == "SGLang's" and len(original.calls) == 1
        assert "layer(s) 1-3 of none ran without" in str(active.health.failed)


def test_one_of_several_ranks_waits_for_the_others(active: SereRuntime) -> None:
    told: list[str] = []
    active.serve(Service(tells=told.append))
    guarded, original = hooked(before_it, HookType.AROUND), Original()
    for _ in range(3):
        assert guarded(original, 1) == "SGLang's"
    assert told == ["a hook: ZeroDivisionError: "] and active.health.failed is None
    active.stop(told[0])
    assert active.health.failed == shown.essential_state(active)["failed"] == told[0]


@pytest.mark.parametrize(
    "numbers",
    [
        {"sere.policy": 99},
        {"sere.policy": 1e300},
        {"sere.policy": 1.5},
        {"sere.policy": -1},
        {"sere.policy": float("nan")},
        {"sere.enabled": 2},
        {"sere.enabled": -1.0},
        {"sere.primary_k": float("inf")},
        {"sere.bogus": 1},
        {"sere.": 1},
        {"sere.min_batch": 1e300},
        {"sere.min_batch": None},
        {"sere.min_batch": "3"},
    ],
)
def test_a_scheduler_takes_nothing_that_we_do_not_write(numbers: dict[str, Any]) -> None:
    with pytest.raises(SereError, match=next(iter(numbers)).replace(".", r"\.")):
        unflatten(numbers)


@pytest.mark.parametrize("numbers", [{"sere.min_batch": 1e12}, {"sere.primary_k": 99.5}])
def test_what_can_be_decoded_is_checked_like_the_nested_form(
    active: SereRuntime, numbers: dict[str, Any]
) -> None:
    changes, _ = unflatten(numbers)
    with pytest.raises(SereError, match=r"min_batch|primary_k"):
        active.prepared(changes)
