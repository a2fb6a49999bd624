"""The layers' own time through SGLang's ``FusedMoE``, and layers that cannot be timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.harness import run

SCRIPT = Path(__file__).with_name("probe_script.py")
LAYERS, EXPERTS, TOP_K, HIDDEN = 3, 16, 4, 64  # of probe_script
EXPERT_BYTES = 3 * HIDDEN * 32 * 2


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """A process of its own: SGLang's global state and our hooks stay there."""
    result = run([sys.executable, str(SCRIPT)])
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", ["measured", "two shapes", "repacked", "reducing"])
def test_a_timed_table_is_consistent(seen: dict[str, Any], case: str) -> None:
    cost = seen[case]["cost"]
    assert cost["source"] == "measured" and cost["seconds"] > 0 and not seen[case]["warnings"]
    assert sorted(i for shape in cost["shapes"] for i in shape["layers"]) == [0, 1, 2]
    for shape in cost["shapes"]:
        assert shape["rows"][0] == 1 and shape["rows"][-1] >= 64
        assert shape["active"][0] == TOP_K and shape["active"][-1] == EXPERTS
        for rows, line in zip(shape["rows"], shape["ms"], strict=True):
            timed = [a for a, ms in zip(shape["active"], line, strict=True) if ms is not None]
            assert all(a <= rows * TOP_K for a in timed), "more experts than the rows can have"
        lines = [*shape["ms"], *zip(*shape["ms"], strict=True)]
        for line in lines:
            there = [ms for ms in line if ms is not None]
            assert all(ms > 0 for ms in there) and there == sorted(there)
    times = seen[case]["times"]
    assert times == pytest.approx(sorted(times))


def test_what_was_run_is_what_the_table_says(seen: dict[str, Any]) -> None:
    """Every cell by as many rows and distinct experts; the runner also checked that no row has an
    expert twice."""
    (shape,) = seen["measured"]["cost"]["shapes"]
    cells = {
        (rows, active)
        for rows, line in zip(shape["rows"], shape["ms"], strict=True)
        for active, ms in zip(shape["active"], line, strict=True)
        if ms is not None
    }
    assert {tuple(call) for call in seen["measured"]["calls"]} == cells


def test_each_shape_has_a_table(seen: dict[str, Any]) -> None:
    shapes = seen["two shapes"]["cost"]["shapes"]
    assert [shape["layers"] for shape in shapes] == [[0, 1], [2]]
    assert [shape["intermediate_size"] for shape in shapes] == [32, 64]
    assert [shape["expert_bytes"] for shape in shapes] == [EXPERT_BYTES, 2 * EXPERT_BYTES]


def test_experts_without_parameters_are_sized_by_the_layer(seen: dict[str, Any]) -> None:
    (shape,) = seen["repacked"]["cost"]["shapes"]
    assert shape["expert_bytes"] == EXPERT_BYTES and shape["slot_flops"] == EXPERT_BYTES


def test_a_sum_over_ranks_is_not_run_and_stays_on(seen: dict[str, Any]) -> None:
    assert seen["reducing"]["restored"]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("unsupported", "NotImplementedError: no such activation"),
        ("out of memory", "OutOfMemoryError: CUDA out of memory"),
        ("no memory at all", "OutOfMemoryError: CUDA out of memory"),
        ("deferred", "their weights are loaded later"),
        ("dispatcher", "exchanges their rows"),
    ],
)
def test_what_cannot_be_timed_is_computed(seen: dict[str, Any], case: str, reason: str) -> None:
    cost = seen[case]["cost"]
    assert cost["source"] == "bandwidth model" and reason in cost["reason"]
    (warning,) = seen[case]["warnings"]
    assert reason in warning and "adaptive uses the bandwidth model" in warning
    (shape,) = cost["shapes"]
    assert shape["expert_ms"] > 0 and shape["slot_ms"] > 0
    times = seen[case]["times"]
    assert times == pytest.approx(sorted(times)) and times[0] > 0


def test_only_one_rank_warns(seen: dict[str, Any]) -> None:
    assert seen["another rank"]["cost"]["source"] == "bandwidth model"
    assert not seen["another rank"]["warnings"]
