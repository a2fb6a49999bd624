"""What MoE layers cost: timed at start, by doctor, or from a file that the launcher checks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sere_sglang.schedule.cost_file import load_cost
from tests.server.cost_files import write_cost
from tests.server.harness import CPU_ENGINE, Server, refusal_of, run
from tests.server.profiles import without_profile

Checkpoint = Callable[[str], Path]
DOCTOR = (sys.executable, "-m", "sere_sglang.cli.main", "doctor")


def test_server_info_holds_the_table(sere: Server) -> None:
    cost = sere.get("/server_info")["sere"]["cost"]
    assert cost["source"] == "measured" and cost["reason"] == "" and cost["step"] is None
    assert cost["hardware"]["threads"] > 0 and cost["seconds"] > 0
    (shape,) = cost["shapes"]
    assert shape["layers"] == [0, 1, 2]
    assert (shape["num_experts"], shape["top_k"], shape["weights"]) == (16, 4, "bfloat16")
    _consistent(shape)
    line = next(x for x in sere.log.read_text().splitlines() if "SERE on" in x)
    assert f"cost of a layer measured in {cost['seconds']:.1f} s" in line


def test_doctor_prints_what_it_writes(sere: Server, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The grid of the server of the same model; a profile is not needed."""
    model = without_profile(checkpoint("qwen3_moe"), tmp_path / "without a profile")
    out = tmp_path / "cost.json"
    done = _doctor(f"--model={model}", f"--out={out}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 MoE layers, 16 experts, top-4" in done.stdout and "GB/s" in done.stdout
    (written,) = json.loads(out.read_text())["shapes"]
    _consistent(written)
    (served,) = sere.get("/server_info")["sere"]["cost"]["shapes"]
    for key in served.keys() - {"ms"}:
        assert served[key] == written[key], key
    cells = [
        (rows, active, ms)
        for rows, line in zip(written["rows"], written["ms"], strict=True)
        for active, ms in zip(written["active"], line, strict=True)
        if ms is not None
    ]
    lines = [x.split() for x in done.stdout.splitlines() if x.endswith("%")]
    assert [(int(rows), int(active)) for rows, active, *_ in lines] == [c[:2] for c in cells]
    for (_, _, ms, floor, share), cell in zip(lines, cells, strict=True):
        assert float(ms) == pytest.approx(cell[2], abs=0.001)
        if float(floor) > 0.05:  # printed to a microsecond
            assert float(share.rstrip("%")) == pytest.approx(100 * float(floor) / cell[2], abs=1)
    assert load_cost(out).cost.num_layers == 3


def test_doctor_stops_at_ctrl_c(checkpoint: Checkpoint) -> None:
    process = subprocess.Popen(
        [*DOCTOR, f"--model={checkpoint('qwen3_moe')}"],
        env={**os.environ, **CPU_ENGINE},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Workers of pytest-xdist ignore the signal, and their children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:  # the workers' start is ahead
        if "loading the model" in line:
            break
    for line in process.stderr:  # a worker writes to the same stream
        if "CPU engine" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stderr.read()  # until the last process that holds it has ended
    assert process.wait(timeout=60) == 130
    assert rest.splitlines()[-1] == "stopped" and "Traceback" not in rest


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model={dense}"], "is a dense model, it has no routed experts"),
        (["--model={root}"], "config.json: no such file"),
        (["--model={root}/absent"], "/absent is neither a folder nor"),
        (["--model={moe}", "--out={root}"], "is a folder; name the file to write"),
        (["--model={moe}", "--out={root}/absent/cost.json"], "cannot be written in"),
        (["--model={moe}", "--device=tpu"], "--device tpu: choose from auto, cpu, cuda"),
        (["--out=cost.json"], "goes with --model MODEL"),
    ],
)
def test_doctor_names_what_is_wrong(
    checkpoint: Checkpoint, tmp_path: Path, arguments: list[str], named: str
) -> None:
    places = {
        "dense": checkpoint("dense"),
        "moe": checkpoint("qwen3_moe"),
        "root": tmp_path,
    }
    done = _doctor(*(x.format(**places) for x in arguments))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert named in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ({"ms": [[1.0, float("nan")], [1.0, 2.0]]}, "shapes[0].ms[0][1] must lie in"),
        ({"ms": [[1.0, 2.0], [1.0, 1.5]]}, "shapes[0].ms falls along rows, from 2 to 1.5"),
        ({"rows": None}, "shapes[0].rows must be a list"),
    ],
)
def test_a_damaged_file_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, edit: dict[str, Any], named: str
) -> None:
    path = write_cost(checkpoint("qwen3_moe"), tmp_path / "cost.json")
    body = json.loads(path.read_text())
    body["shapes"][0] |= {key: value or "x" for key, value in edit.items()}
    path.write_text(json.dumps(body))
    assert f"--sere-cost {path}: {named}" in _refused(checkpoint("qwen3_moe"), path)


def test_a_file_of_another_model_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = write_cost(checkpoint("olmoe"), tmp_path / "cost.json")
    message = _refused(checkpoint("qwen3_moe"), path)
    assert "does not fit" in message and "config fingerprint: file " in message
    assert "sere-sglang doctor --model" in message


def test_a_file_that_is_not_there_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "absent.json"
    assert f"--sere-cost {path}: no such file" in _refused(checkpoint("qwen3_moe"), path)


def _refused(model: Path, cost: Path) -> str:
    """By ``sglang serve``, before any process starts."""
    result = refusal_of(f"--model-path={model}", "--moe-backend=sere", f"--sere-cost={cost}")
    errors = [x for x in result.stderr.splitlines() if x.startswith("sere-sglang: error:")]
    assert result.returncode == 2 and len(errors) == 1, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    return errors[0]


def _doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run([*DOCTOR, *arguments], {"COLUMNS": "200"})


def _consistent(shape: dict[str, Any]) -> None:
    """Nothing about its size: no time falls where rows or experts are added."""
    assert shape["active"][0] == shape["top_k"] and shape["active"][-1] == shape["num_experts"]
    for line in [*shape["ms"], *zip(*shape["ms"], strict=True)]:
        there = [ms for ms in line if ms is not None]
        assert there and there == sorted(there) and there[0] > 0
