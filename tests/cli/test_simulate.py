"""``sere-sglang simulate``, as a user runs it, and what its runs say."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sere_sglang.cli import simulate
from sere_sglang.cli.main import app
from sere_sglang.options import OPTIONS
from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost import StepModel
from sere_sglang.schedule.point import OFF
from sere_sglang.schedule.simulate import Simulator, Traffic
from sere_sglang.schedule.trace import TraceWriter
from tests.cli.command import WIDE
from tests.schedule.toy_model import COST, expectation, settings
from tests.server.cost_files import write_cost

MODEL = Path(__file__).resolve().parents[2] / "demo_model"
PROFILE = MODEL / "sere_profile.safetensors"
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


@pytest.fixture
def cost(tmp_path: Path) -> Path:
    """An expert of the demo model takes 10 us."""
    return write_cost(MODEL, tmp_path / "cost.json", expert_ms=0.01)


def test_command_on_a_trace(tmp_path: Path, cost: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    writer = TraceWriter(trace)
    for rows in [1, 8, 48] * 40:
        writer.write(BatchComposition("decode", decode_tokens=rows), OFF)
    writer.flush()
    result = _command(
        f"--profile={PROFILE}", f"--cost={cost}", f"--trace={trace}", "--fixed-ms=0.1",
        f"--out={tmp_path}", "--tpot-slo-ms=0.3", "--quality-budget=0.08",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "simulate.json").read_text())["rows"]
    assert [row["policy"] for row in rows][-2:] == ["adaptive", "slo 0.3 ms"]
    assert all(row["steps"] == 120 for row in rows)
    assert (tmp_path / "simulate.png").stat().st_size > 10_000
    assert "TPOT" in result.stdout


@pytest.mark.parametrize("rule", ["energy", "auto", "budget", "topk"])
def test_command_under_another_rule(tmp_path: Path, cost: Path, rule: str) -> None:
    given = [
        "--steps=600",
        "--rate=200",
        "--peak=300",
        f"--rule={rule}",
        f"--out={tmp_path}",
        "--quality-budget=0.05",
    ]
    command = ["simulate", f"--profile={PROFILE}", f"--cost={cost}", *given]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "simulate.json").read_text())["rows"]
    exact, *_, adaptive = rows
    assert adaptive["policy"] == "adaptive" and 0 < adaptive["loss"] <= 0.05
    assert adaptive["active"] < exact["active"] and adaptive["rerouted_steps"] > 0.5
    assert "static" in {row["policy"].split()[0] for row in rows} or rule == "budget"


def test_the_step_is_the_files_where_no_flag_says_otherwise(tmp_path: Path) -> None:
    """One row: 6 experts of 10 us in each of 4 layers, and what the step adds; steps differ by
    noise of 2 %."""
    trace = tmp_path / "trace.jsonl"
    writer = TraceWriter(trace)
    for _ in range(20):
        writer.write(BatchComposition("decode", decode_tokens=1), OFF)
    writer.flush()
    step = StepModel(fixed_ms=1.0, row_ms=0.5, scale=2.0)
    bare = write_cost(MODEL, tmp_path / "bare.json", expert_ms=0.01)
    file = write_cost(MODEL, tmp_path / "step.json", expert_ms=0.01, step=step)
    for given, expected in (
        ([f"--cost={bare}"], 0.24),
        ([f"--cost={bare}", "--fixed-ms=1", "--row-us=200"], 1.44),
        ([f"--cost={file}"], 1.98),
        ([f"--cost={file}", "--fixed-ms=0"], 0.98),
    ):
        command = ["simulate", f"--profile={PROFILE}", f"--trace={trace}", f"--out={tmp_path}"]
        result = CliRunner().invoke(app, [*command, *given])
        assert result.exit_code == 0, result.output
        (exact, *_) = json.loads((tmp_path / "simulate.json").read_text())["rows"]
        assert exact["tpot_p50_ms"] == pytest.approx(expected, rel=0.05)


def test_the_simulated_budget_is_the_served_one() -> None:
    defaults = inspect.signature(simulate.command).parameters
    assert defaults["quality_budget"].default == OPTIONS["sere_quality_budget"].default
    assert defaults["min_gain"].default == OPTIONS["sere_min_gain"].default


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--profile=/absent"], "/absent: no such file"),
        ([f"--profile={PROFILE}", "--trace=/absent"], "--trace /absent: cannot be read"),
        ([f"--profile={PROFILE}", "--primary-k=6"], "--primary-k 6: give S from 1 to 5"),
        ([f"--profile={PROFILE}", "--steps=0"], "'--steps': Input should be greater than or"),
        ([f"--profile={PROFILE}", "--rate=0"], "'--rate': 0 is no finite number above 0"),
        ([f"--profile={PROFILE}", "--rate=inf"], "'--rate': inf is no finite number above 0"),
        ([f"--profile={PROFILE}", "--peak=-5"], "'--peak': -5 is no finite number above 0"),
        ([f"--profile={PROFILE}", "--period=nan"], "'--period': nan is no finite number above 0"),
        ([f"--profile={PROFILE}", "--tokens=0.5"], "'--tokens': Input should be greater than or"),
        ([f"--profile={PROFILE}", "--tokens=nan"], "'--tokens': Input should be greater than or"),
        ([f"--profile={PROFILE}", "--max-running=0"], "'--max-running': Input should be greater"),
        ([f"--profile={PROFILE}", "--seed=-1"], "'--seed': Input should be greater than or"),
        (
            [f"--profile={PROFILE}", "--quality-budget=3"],
            "--quality-budget 3.0: must lie in [0, 1]",
        ),
        ([f"--profile={PROFILE}", "--rule=oea"], "--rule oea: must be one of similarity"),
        ([f"--profile={PROFILE}", "--rule=energy", "--primary-k=1"], "rule energy has no S"),
        ([f"--profile={PROFILE}", "--cost=/absent"], "--cost /absent: no such file"),
    ],
)
def test_command_names_what_is_wrong(arguments: list[str], named: str, cost: Path) -> None:
    result = CliRunner().invoke(app, ["simulate", f"--cost={cost}", *arguments], env=WIDE)
    assert result.exit_code == 2 and result.stderr.startswith("sere-sglang: error: ")
    assert named in result.stderr and "Traceback" not in result.stderr


def test_a_cost_of_another_model_is_refused(cost: Path) -> None:
    body = json.loads(cost.read_text())
    body["model"] |= {"name": "another", "fingerprint": "0" * 16}
    cost.write_text(json.dumps(body))
    result = _command(f"--profile={PROFILE}", f"--cost={cost}")
    assert result.returncode == 2 and f"--cost {cost} (of another) does not fit" in result.stderr


def test_traffic_is_reproducible() -> None:
    first = SIMULATOR.serve("a", settings(), dataclasses.replace(TRAFFIC, seed=4), 500)
    second = SIMULATOR.serve("b", settings(), dataclasses.replace(TRAFFIC, seed=4), 500)
    assert first.step_ms == second.step_ms
