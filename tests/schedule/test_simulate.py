"""``sere-sglang simulate``, as a user runs it, and what its runs say."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy_model import COST, expectation, settings

from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost import StepModel
from sere_sglang.schedule.feedback import Feedback
from sere_sglang.schedule.policy import OFF
from sere_sglang.schedule.simulate import Simulator, Traffic
from sere_sglang.schedule.trace import TraceWriter

PROFILE = Path(__file__).resolve().parents[2] / "demo_model" / "sere_profile.safetensors"
TRAFFIC = Traffic(rate=1.0, peak=12.0, period_s=20.0, tokens=60, max_running=96, prefill_ms=1.0)
SIMULATOR = Simulator(expectation(), COST, StepModel(5.0, 0.05, 1.0), noise=0.02)


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sere_sglang.cli.main", "simulate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_faster_policies_serve_the_same_arrivals_with_smaller_batches() -> None:
    exact = SIMULATOR.serve("exact", settings(enabled=False), TRAFFIC, 6000)
    strong = SIMULATOR.serve("static", settings(policy="static", primary_k=1), TRAFFIC, 6000)
    adaptive = SIMULATOR.serve("adaptive", settings(), TRAFFIC, 6000)
    assert sum(exact.loss) == 0 and set(exact.primary_k) == {0}
    assert strong.summary()["tpot_p50_ms"] < exact.summary()["tpot_p50_ms"]
    assert strong.summary()["rows"] < exact.summary()["rows"]
    assert max(adaptive.loss) <= settings().quality_budget
    assert adaptive.summary()["tpot_p99_ms"] < exact.summary()["tpot_p99_ms"]


def test_slo_holds_its_target_where_it_can() -> None:
    exact = SIMULATOR.serve("exact", settings(enabled=False), TRAFFIC, 6000)
    target = 0.85 * exact.summary()["tpot_p99_ms"]
    now = settings(policy="slo", quality_budget=0.3, tpot_slo_ms=target)
    run = SIMULATOR.serve("slo", now, TRAFFIC, 6000)
    late = sum(step > 1.1 * target for step in run.step_ms) / len(run.step_ms)
    assert late < 0.02
    assert 0.0 < run.summary()["rerouted_steps"] < 0.9, "exact whenever that is fast enough"


def test_command_on_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    writer = TraceWriter(trace)
    for rows in [1, 8, 48] * 40:
        writer.write(BatchComposition("decode", decode_tokens=rows), OFF, Feedback())
    writer.flush()
    result = _command(
        f"--profile={PROFILE}", f"--trace={trace}", "--fixed-ms=0.1", f"--out={tmp_path}",
        "--tpot-slo-ms=0.3",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "simulate.json").read_text())["rows"]
    assert [row["policy"] for row in rows][-2:] == ["adaptive", "slo 0.3 ms"]
    assert all(row["steps"] == 120 for row in rows)
    assert (tmp_path / "simulate.png").stat().st_size > 10_000
    assert "TPOT" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--profile=/absent"], "/absent: no such file"),
        ([f"--profile={PROFILE}", "--trace=/absent"], "--trace /absent: cannot be read"),
        ([f"--profile={PROFILE}", "--primary-k=6"], "primary_k must be in [1, 5]"),
        ([f"--profile={PROFILE}", "--quality-budget=3"], "quality_budget must lie in [0, 1]"),
    ],
)
def test_command_names_what_is_wrong(arguments: list[str], named: str) -> None:
    result = _command(*arguments)
    assert result.returncode == 1
    assert named in result.stderr and "Traceback" not in result.stderr


def test_traffic_is_reproducible() -> None:
    first = SIMULATOR.serve("a", settings(), dataclasses.replace(TRAFFIC, seed=4), 500)
    second = SIMULATOR.serve("b", settings(), dataclasses.replace(TRAFFIC, seed=4), 500)
    assert first.step_ms == second.step_ms
