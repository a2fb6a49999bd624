"""``sere-sglang bench`` and ``evaluate`` against real servers, under a load of seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sere_sglang.cli.main import app
from sere_sglang.cli.served import FORCING_FLAG
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


def test_evaluate_measures_a_server_that_runs_and_goes_on_where_it_was(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": q, "answer": "7"}) + "\n" for q in "abc"))
    with serve(
        checkpoint("qwen3_moe"),
        tmp_path / "log",
        "--moe-backend=sere",
        FORCING_FLAG,
        whole_batches=False,
    ) as server:
        before = server.sere()

        def evaluate(*arguments: str) -> list[dict[str, Any]]:
            command = ["evaluate", f"--url={server.url}", f"--out={tmp_path}", *arguments]
            done = CliRunner().invoke(app, command)
            assert done.exit_code == 0, done.output
            return json.loads((tmp_path / "evaluate.json").read_text())["rows"]

        rows = evaluate("--batch=2,4", "--points=S=1,S=3/1", "--sequences=4")
        cells = (tmp_path / "cells.jsonl").read_text()
        assert cells.count("\n") == 4
        assert [(row["batch"], row["point"]) for row in rows] == [
            (2, "S=1"), (2, "S=3/1"), (4, "S=1"), (4, "S=3/1"),
        ]  # fmt: skip
        # The same command repeats nothing; one point more measures that alone.
        assert evaluate("--batch=2,4", "--points=S=1,S=3/1", "--sequences=4") == rows
        assert (tmp_path / "cells.jsonl").read_text() == cells
        more = evaluate("--batch=4", "--points=S=1,S=2", "--sequences=4")
        assert more[0] == rows[2] and more[1]["point"] == "S=2"
        assert (tmp_path / "cells.jsonl").read_text().count("\n") == 5
        for row in (*rows, *more):
            low, high = row["kl_interval"]
            assert low <= row["kl"] <= high and row["kl"] <= row["kl_p99"] * 1.5 + 1e-9
            assert 0 < row["bytes_share"] <= 1 and row["bytes_share"] == row["active_share"]
            assert row["sequences"] == 4 and 0 <= row["top1_agreement"] <= 1
            if row["point"] == "S=3/1":  # moves nothing
                assert row["kl"] < 1e-3 and row["active_share"] == 1.0
            else:
                assert row["kl"] > 1e-3 and row["active_share"] < 1.0
        assert "<svg" in (tmp_path / "evaluate.html").read_text()

        asked = evaluate(f"--jsonl={questions}", "--batch=2", "--points=S=1", "--max-tokens=8")
        assert [(row["point"], row["questions"]) for row in asked] == [("off", 3), ("S=1", 3)]
        assert asked[0]["difference"] == 0.0
        after = server.sere()
    for name in ("enabled", "policy", "primary_k", "threshold", "min_batch", "rule"):
        assert after[name] == before[name]
