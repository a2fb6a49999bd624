"""``sere-sglang bench`` and ``evaluate`` against real servers, under a load of seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sere_sglang.cli.main import app
from tests.server.harness import serve


def test_bench_starts_a_server_and_measures_it(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sere_sglang.cli.served.serve", serve)
    done = CliRunner().invoke(
        app,
        [
            "bench", f"--model={checkpoint('qwen3_moe')}", "--quick", "--concurrency=1,4",
            "--rounds=2", "--points=S=1,adaptive,auto", f"--out={tmp_path}",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["finished"] and result["text"] == "built-in" and result["left_out"] == {}
    rows = {(row["streams"], row["routing"]): row for row in result["rows"]}
    assert set(rows) == {(n, r) for n in (1, 4) for r in ("off", "S=1", "adaptive", "auto")}
    for (streams, routing), row in rows.items():
        assert len(row["tok_s_by_round"]) == row["rounds"] == 2
        assert 0 < row["tpot_p50_ms"] <= row["tpot_p99_ms"]
        low, high = row["kl_interval"]
        assert 0 <= low <= row["kl"] <= high
        assert 0 < row["active_after"] <= row["active_before"] <= 16
        if routing == "S=1":
            assert row["kl"] > 0
        if (streams, routing) == (4, "S=1"):
            assert row["active_after"] < row["active_before"]
    assert rows[4, "off"]["kl"] < rows[4, "S=1"]["kl"] / 10
    told = " ".join(done.output.split())
    assert "2 rounds only, too few for 95 %" in told and "SERE off" in told
    assert "x (" not in told  # nothing is claimed of two rounds
    assert (tmp_path / "bench.png").stat().st_size > 10_000
