"""Traces and cost files: every step and table of them, or one refusal."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost_file import describe, load_cost
from sere_sglang.schedule.point import OperatingPoint
from sere_sglang.schedule.trace import TraceWriter, read_trace
from tests.fuzz.outcome import cases, outcome

SEEDS = st.integers(0, 1 << 32)
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 1.5, 1 << 63, 10**400, math.nan, math.inf, "", "x" * 9000, [], {}, [None],
    {"a": 1}, [[1]], "decode", "static", "energy", "7",
)  # fmt: skip
COST = {
    "format": "sere-cost",
    "version": 1,
    "model": {"name": "m", "fingerprint": "f", "layers": [0, 1], "num_experts": 8, "top_k": 2},
    "hardware": {"cpu": "x"},
    "shapes": [
        {"layers": [0, 1], "num_experts": 8, "top_k": 2, "hidden_size": 16, "intermediate_size": 32,
         "weights": "bf16", "expert_bytes": 3072.0, "slot_flops": 3072.0, "share": 1.0,
         "rows": [1, 8], "active": [1, 4, 8], "ms": [[0.1, 0.2, None], [0.2, 0.3, 0.4]]},
    ],
    "step": {"fixed_ms": 1.0, "row_ms": 0.1, "scale": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "file"


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = []
    for key in list(keys):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += _places(value[key])
    return found


def _changed(value: Any, draw: random.Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 3))):
        holder, key = draw.choice(_places(value))
        how = draw.randrange(3)
        if how == 0:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
        elif how == 1 and isinstance(holder, dict):
            holder[draw.choice(("x", "a" * 500, "primary_k"))] = holder.pop(key)
        elif isinstance(holder, list):
            holder.insert(draw.randrange(len(holder) + 1), copy.deepcopy(draw.choice(VALUES)))
        if not _places(value):
            break
    return value


def _scrambled(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice((1, 2, 8))):
        at = draw.randrange(len(out))
        how = draw.randrange(3)
        if how == 0:
            out[at] = draw.randrange(256)
        elif how == 1:
            out[at : at + draw.randrange(40)] = b""
        else:
            out[at:at] = draw.choice((b"[" * 100_000, b"\n", b"9" * 5000, b"\xff", b"\0", b'"'))
        if not out:
            break
    return bytes(out)


def _load_cost(path: Path) -> Any:
    """Also what a server shows and predicts with."""
    cost = load_cost(path).cost
    told = json.dumps(describe(cost), allow_nan=False)
    for layer, _ in cost.layers:
        assert math.isfinite(float(layer.ms_of(4, 2.0))) if hasattr(layer, "ms_of") else True
    return told


@given(seed=SEEDS)
@cases(600)
def test_cost_files(seed: int, path: Path) -> None:
    draw = random.Random(seed)
    text = json.dumps(_changed(COST, draw)).encode()
    path.write_bytes(_scrambled(text, draw) if draw.random() < 0.3 else text)
    _, refusal = outcome(lambda: _load_cost(path))
    assert refusal is None or ("--sere-cost" in refusal and "doctor" in refusal), refusal


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of a real trace."""
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    writer = TraceWriter(path)
    point = OperatingPoint(True, 2, 0.25, layers=((0, OperatingPoint(True, 1, 0.5)),))
    for step in range(3):
        batch = BatchComposition("decode", decode_tokens=8, padded_rows=8, running=8, step=step)
        writer.write(batch, point)
    writer.flush()
    return [json.loads(line) for line in path.read_text().splitlines()]


@given(seed=SEEDS)
@cases(600)
def test_traces(seed: int, path: Path, lines: list[dict[str, Any]]) -> None:
    draw = random.Random(seed)
    text = "\n".join(json.dumps(_changed(line, draw)) for line in lines).encode() + b"\n"
    path.write_bytes(_scrambled(text, draw) if draw.random() < 0.3 else text)
    steps, refusal = outcome(lambda: list(read_trace(path)))
    if steps is None:
        assert refusal is not None and "--trace" in refusal and "line " in refusal
        return
    for step in steps:
        batch = step.composition
        for field in dataclasses.fields(batch):
            value = getattr(batch, field.name)
            assert type(value) is {"mode": str, "after_idle": bool}.get(field.name, int)
        assert batch.num_tokens >= 0 and math.isfinite(step.time)
        assert isinstance(step.point.at(0).primary_k, int)


@given(name=st.text(max_size=300), parts=st.integers(1, 40))
@cases(100)
def test_any_name_of_a_file(name: str, parts: int) -> None:
    path = "/nonexistent/" + "/".join([name] * parts)
    assert outcome(lambda: list(read_trace(path)))[0] is None
    assert outcome(lambda: load_cost(path))[0] is None
    assert outcome(lambda: TraceWriter("/proc/" + path))[0] is None


@pytest.mark.parametrize("reader", [load_cost, lambda path: list(read_trace(path))])
@pytest.mark.parametrize("what", ["/dev/zero", "folder", "loop"])
def test_what_is_no_file(reader: Any, what: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert outcome(lambda: reader(tmp_path / what))[0] is None
