"""What ``/metrics`` will show, without a server: names and units."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import prometheus_client
import pytest

from sere_sglang.runtime.metrics import PREFIX, SereMetrics
from sere_sglang.schedule.point import OperatingPoint
from tests.schedule.toy_model import settings

DASHBOARD = Path(__file__).resolve().parents[2] / "launch" / "grafana.json"


@pytest.fixture
def shown() -> Iterator[dict[str, float]]:
    """Samples by name after one step at known times."""
    before = set(prometheus_client.REGISTRY._collector_to_names)
    metrics = SereMetrics({"model_name": "m"}, layer_ids=[0])
    metrics.set_policy(settings(policy="slo", tpot_slo_ms=25.0))
    metrics.set_point(OperatingPoint(True, 2, 0.5), budget=0.02, predicted_ms=11.0)
    metrics.observe_step(12.0, 13.0)
    metrics.count_forward("decode", 4, True)
    yield {
        sample.name: sample.value
        for family in prometheus_client.REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith(PREFIX)
    }
    for collector in set(prometheus_client.REGISTRY._collector_to_names) - before:
        prometheus_client.REGISTRY.unregister(collector)


def test_times_are_in_seconds(shown: dict[str, float]) -> None:
    assert shown["sglang:sere_tpot_slo_seconds"] == pytest.approx(0.025)
    assert shown["sglang:sere_predicted_step_seconds"] == pytest.approx(0.011)
    assert shown["sglang:sere_step_seconds"] == pytest.approx(0.013)
    assert shown["sglang:sere_tpot_seconds_sum"] == pytest.approx(0.012)
    assert shown["sglang:sere_tpot_seconds_count"] == 1


def test_names_are_in_base_units(shown: dict[str, float]) -> None:
    assert len(shown) > 10
    assert not [name for name in shown if re.search(r"_(ms|us|milliseconds)(_|$)", name)]


def test_the_dashboard_asks_for_what_there_is(shown: dict[str, float]) -> None:
    families = {
        sample.name
        for family in prometheus_client.REGISTRY.collect()
        if family.name.startswith(PREFIX)
        for sample in [*family.samples, prometheus_client.metrics_core.Sample(family.name, {}, 0)]
    }
    asked = set(re.findall(r"sglang:sere_\w+", DASHBOARD.read_text()))
    known = {
        *families,
        *(f"{name}_{part}" for name in families for part in ("bucket", "sum", "count")),
    }
    assert asked and not asked - known
