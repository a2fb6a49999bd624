"""What ``sere-sglang bench`` claims, writes and refuses, without a server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

from sere_sglang.cli import speed_plot
from sere_sglang.cli.bench_run import Bench, Level, Quality
from sere_sglang.cli.bench_table import Row, best, bursts, gain, table
from sere_sglang.cli.main import app
from sere_sglang.cli.served import without_keys
from sere_sglang.measure.routing import ADAPTIVE, OFF, static
from sere_sglang.measure.turns import Speed
from tests.server.checkpoints import write_checkpoint


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("ratio", "interval", "rounds", "words"),
    [
        (1.57, (1.47, 1.76), 10, "1.57x (1.47-1.76)"),
        (1.01, (0.97, 1.04), 10, "no gain (0.97-1.04)"),
        (1.30, (1.0, 1.6), 10, "no gain (1.00-1.60)"),
        # What is shown as 1.00 is no gain either.
        (1.02, (1.004, 1.03), 10, "no gain (1.00-1.03)"),
        (0.82, (0.8, 0.9), 10, "0.82x (0.80-0.90) slower"),
        (0.99, (0.98, 0.997), 10, "no gain (0.98-1.00)"),
        # Too few rounds for 95 %: a question, not a claim.
        (1.57, (1.47, 1.76), 5, "1.57? (1.47-1.76)"),
        (1.57, (1.57, 1.57), 1, "1.57? (1.57-1.57)"),
        (1.0, (0.9, 1.1), 1, "no gain (0.90-1.10)"),
    ],
)
def test_a_ratio_claims_no_more_than_its_interval(
    ratio: float, interval: tuple[float, float], rounds: int, words: str
) -> None:
    assert gain(ratio, interval, rounds) == words


def a_row(routing: str, streams: int, ratio: float, low: float, kl: float | None) -> Row:
    return Row(
        streams=streams,
        routing=routing,
        rounds=6,
        tok_s=100 * ratio,
        tpot_p50_ms=10.0,
        tpot_p99_ms=20.0,
        over_off=ratio,
        over_off_interval=(low, ratio + 0.1),
        active_before=30.0,
        active_after=20.0,
        rerouted_steps=1.0,
        kl=kl,
        kl_interval=None if kl is None else (kl, kl),
        tok_s_by_round=[100 * ratio] * 6,
    )


def test_the_table_says_no_gain_and_the_sentence_names_the_mildest_gain() -> None:
    rows = [
        a_row("off", 4, 1.0, 1.0, 0.0),
        a_row("S=1", 4, 1.8, 1.6, 0.3),
        a_row("off", 16, 1.0, 1.0, 0.0),
        a_row("S=1", 16, 1.5, 1.4, 0.2),
        a_row("S=2", 16, 1.2, 1.1, 0.05),
        a_row("S=3", 16, 1.02, 0.97, 0.01),
    ]
    console = Console(width=200, record=True, file=sys.stderr)
    console.print(table(rows, "a model"))
    text = console.export_text()
    assert "no gain (0.97-1.12)" in text and "1.02x" not in text
    assert "1.20x (1.10-1.30)" in text and "30.0 > 20.0" in text
    assert best(rows) == "at 16 streams S=2 is 1.20x (1.10-1.30), at 0.0500 nats of KL"
    assert best([row for row in rows if row.routing in ("off", "S=3")]) is None
    unwalked = a_row("S=1", 4, 1.8, 1.6, None)
    assert best([unwalked]) is None


def test_every_interval_lies_in_the_picture() -> None:
    rows = [a_row("off", 1, 1.0, 0.9, 0.0), a_row("S=1", 1, 1.2, 0.3, 0.1)]
    rows[1].over_off_interval = (0.3, 2.5)
    panel = Figure().subplots()
    speed_plot._speed_against_quality(panel, rows, "exact routing")
    low, high = panel.get_ylim()
    assert low < 0.3 and high > 2.5


def test_bursts_are_warned_of() -> None:
    even = a_row("off", 4, 1.0, 1.0, 0.0)
    even.tpot_p50_ms = 1000 * even.streams / even.tok_s
    uneven = a_row("S=1", 4, 1.5, 1.4, 0.0)
    uneven.tpot_p50_ms = 0.1
    assert bursts([even]) is None
    assert "bursts" in (told := bursts([even, uneven]) or "") and "4 streams S=1" in told
    assert "off" not in told


def test_the_file_holds_what_there_is(tmp_path: Path) -> None:
    bench = Bench({"model": "a/model"}, tmp_path / "bench.json")
    bench.write()
    assert json.loads(bench.path.read_text())["rows"] == []
    level = bench.levels.setdefault(8, Level())
    level.speeds |= {OFF: Speed({0: 100.0, 1: 110.0}, [10.0] * 9), ADAPTIVE: Speed()}
    bench.write()
    payload = json.loads(bench.path.read_text())
    assert [row["routing"] for row in payload["rows"]] == ["off"] and not payload["finished"]
    level.speeds[ADAPTIVE] = Speed({0: 150.0}, [8.0] * 9)
    level.quality[ADAPTIVE] = Quality((30.0, 20.0), 1.0, np.array([0.01, 0.03]))
    bench.write()
    row = json.loads(bench.path.read_text())["rows"][1]
    assert row["over_off"] == pytest.approx(1.5) and row["rounds"] == 1
    assert row["kl"] == pytest.approx(0.02) and row["tpot_p99_ms"] == 8.0
    assert list(tmp_path.iterdir()) == [bench.path]


def test_a_routing_is_known_by_its_name() -> None:
    assert OFF.over({"rule": "energy"}) == OFF
    assert static(2).over({"rule": "energy", "min_gain": 0.5}).settings == {
        **(static(2).settings or {}), "min_gain": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model MODEL to start a server, or --url URL"),
        (["--model", "{moe}", "--url", "http://x"], "give --model MODEL to start a server, or"),
        (["--model", "{moe}"], "it has no profile yet; write one, once, with 'sere-sglang calibr"),
        (["--model", "{dense}"], "--model: {dense} (Qwen3ForCausalLM) is a dense model"),
        (["--model", "/absent/model"], "--model /absent/model"),
        (["--model", "{moe}", "--concurrency", "4,x"], "--concurrency 4,x: give numbers from 1 to"),
        (["--model", "{moe}", "--concurrency", "257"], "--concurrency 257: give numbers from 1 to"),
        (["--model", "{moe}", "--points", "S=2,hard"], "--points 'hard': no such operating point"),
        (["--model", "{moe}", "--points", "off"], "--points off: name what to compare with off"),
        (["--model", "{moe}", "--concurrency", ""], "--concurrency : give numbers from 1 to 256"),
        (["--model", "{moe}", "--device", "tpu"], "--device tpu: choose from"),
        (["--model", "{moe}", "--out", "{moe}/config.json"], "no folder to write in"),
        (["--model", "{moe}", "--text", "none.txt"], "--text none.txt: no such file"),
        (["--model", "{moe}", "--text", "{moe}"], "--text {moe}: a folder; name one file"),
        (["--model", "{moe}", "--text", "{moe}/model.safetensors"], "cannot read .safetensors"),
        (["--model", "{moe}", "--", "--port", "30000"], "-- --port: the command chooses the addr"),
        (
            ["--model", "{moe}", "--", "--ssl-certfile=x"],
            "drop --ssl-certfile, or measure",
        ),
        (["--model", "{moe}", "--", "--tp=2", "--port=1"], "drop --port, or measure a server"),
        (["--model", "{moe}", "--", "--host=::"], "-- --host: the command chooses the address"),
        (["--model", "{moe}", "--", "--config", "x"], "-- --config: the command chooses the addr"),
        (["--model", "{moe}", "--", "--por", "1"], "-- --por: the command chooses the address"),
        (["--url", "http://127.0.0.1:9"], "no SGLang server answers at http://127.0.0.1:9"),
        (["--url", "http://127.0.0.1:9", "--plain"], "--plain starts a second server"),
        (["--url", "http://127.0.0.1:9", "--", "--tp", "2"], "its server has its flags already"),
    ],
)
def test_bench_refuses_in_one_line(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no cache holds a profile
    monkeypatch.chdir(tmp_path)
    folders = {"moe": str(tmp_path / "moe"), "dense": str(tmp_path / "dense")}
    write_checkpoint("qwen3_moe", tmp_path / "moe")
    write_checkpoint("dense", tmp_path / "dense")
    code, output = run("bench", *(a.format(**folders) for a in arguments))
    assert code == 2
    assert output.startswith("sere-sglang: error: ") and output.count("\n") == 1, output
    assert message.format(**folders) in output


def test_help_teaches() -> None:
    code, output = run("bench", "--help")
    assert code == 0
    for word in ("no gain", "nats per token", "--quick", "sere-sglang calibrate", "Ctrl-C"):
        assert word in output


def test_keys_are_not_kept() -> None:
    typed = ["--api-key", "secret", "--model=m", "--", "--admin-api-key=secret", "--tp", "2"]
    kept = ["--api-key", "...", "--model=m", "--", "--admin-api-key=...", "--tp", "2"]
    assert without_keys(typed) == kept
