"""The trace file: what is written is read back; damage is named; a full disk costs no forward."""

from __future__ import annotations

from pathlib import Path

import pytest

from sere_sglang.errors import SereError
from sere_sglang.schedule import trace as module
from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.point import OFF, OperatingPoint
from sere_sglang.schedule.trace import TraceWriter, read_trace

STEP = BatchComposition("verify", verify_tokens=12, padded_rows=16, running=4, exact_rows=3, step=7)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trace.jsonl"
    writer = TraceWriter(path)
    writer.write(STEP, OperatingPoint(True, 2, 0.25), step_ms=3.5, budget=0.1, spent_loss=0.02)
    writer.write(BatchComposition("extend", prefill_tokens=99), OFF)
    writer.flush()
    first, second = read_trace(path)
    assert (first.composition, first.point) == (STEP, OperatingPoint(True, 2, 0.25))
    assert (first.step_ms, first.budget, first.spent_loss) == (3.5, 0.1, 0.02)
    assert second.composition.prefill_tokens == 99 and second.point == OFF


def test_points_of_layers_survive(tmp_path: Path) -> None:
    own = ((0, OperatingPoint(True, 1, 0.5)), (3, OFF))
    point = OperatingPoint(True, 2, 0.25, own)
    writer = TraceWriter(tmp_path / "trace.jsonl")
    writer.write(STEP, point)
    writer.flush()
    (step,) = read_trace(tmp_path / "trace.jsonl")
    assert step.point == point and step.point.at(3) == OFF and step.point.at(1).primary_k == 2


def test_rotation_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BYTES", 4000)
    path = tmp_path / "trace.jsonl"
    writer = TraceWriter(path)
    for step in range(200):
        writer.write(BatchComposition("decode", decode_tokens=1, step=step), OFF)
    writer.flush()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "trace.jsonl", "trace.jsonl.1", "trace.jsonl.2", "trace.jsonl.3"
    ]  # fmt: skip
    assert all(p.stat().st_size <= 4000 for p in tmp_path.iterdir())
    assert [s.composition.step for s in read_trace(path)][-1] == 199


def test_a_disk_that_fills_ends_the_trace_only(caplog: pytest.LogCaptureFixture) -> None:
    writer = TraceWriter("/dev/full")
    for _ in range(300):
        writer.write(STEP, OFF)
    writer.flush()
    (record,) = caplog.records
    assert "--sere-trace: " in record.message and "serving goes on" in record.message


def test_what_cannot_be_written_or_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SereError, match=r"--sere-trace .*cannot be written"):
        TraceWriter(tmp_path)
    with pytest.raises(SereError, match="cannot be read"):
        list(read_trace(tmp_path / "absent"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"time": 1.0, "mode": "decode", "point": {"enabled": false}}\nnot json\n')
    with pytest.raises(SereError, match="line 2: no trace"):
        list(read_trace(bad))
