"""launch/model.sh: what each model's commands are, held to the parsers that will read them."""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import sglang.benchmark
from sglang.srt.server_args import ServerArgs
from typer.main import get_command

from sere_sglang import config
from sere_sglang.cli.main import app
from sere_sglang.config_check import checked, resolved

ROOT = Path(__file__).resolve().parents[2]
MODELS = sorted(path.stem for path in (ROOT / "launch" / "models").glob("*.sh"))
ASKED_FOR = {
    "qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v2-lite", "deepseek-v3", "qwen1.5-moe-a2.7b",
    "mixtral-8x7b", "gpt-oss-20b", "glm-4.5",
}  # fmt: skip


def _dry(*arguments: str, **env: str) -> list[list[str]]:
    """The commands that a run would have run."""
    command = ["bash", str(ROOT / "launch" / "model.sh"), *arguments, "--dry-run"]
    if "--" in arguments:  # everything behind it is the server's
        command.remove("--dry-run")
        command.insert(3, "--dry-run")
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **env}, check=True
    )
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_every_model_is_there() -> None:
    assert set(MODELS) >= ASKED_FOR


@pytest.mark.parametrize("name", MODELS)
def test_servers_flags_are_known(name: str) -> None:
    calibrate, serve = _dry(name, "--", "--enable-metrics")
    assert serve[:2] == ["sglang", "serve"] and serve[-1] == "--enable-metrics"
    parser = argparse.ArgumentParser(exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    config.add_cli_args(parser)
    given = parser.parse_args(serve[2:])
    assert given.model_path and given.tp_size >= 1
    asked = checked(config.from_namespace(given))
    assert asked.enabled
    resolved(asked, top_k=2)
    at = calibrate.index("--")
    assert calibrate[:3] == ["sere-sglang", "calibrate", "--model"]
    assert parser.parse_args(["--model-path=x", *calibrate[at + 1 :]]).tp_size == given.tp_size
    command = get_command(app).commands["calibrate"]  # type: ignore[attr-defined]
    context = command.make_context("calibrate", calibrate[2:], resilient_parsing=True)
    assert context.params["model"] == given.model_path and context.params["if_missing"]


@pytest.mark.parametrize("name", MODELS)
def test_the_benchmarks_flags_are_known(name: str) -> None:
    """Its parser is built where it runs: the options are read from its source."""
    (bench,) = _dry(name, "bench")
    assert bench[:3] == ["python", "-m", "sglang.benchmark.serving"]
    source = Path(sglang.benchmark.__path__[0], "serving.py").read_text()
    options = {
        node.args[0].value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
        and isinstance(node.args[0], ast.Constant)
    }
    assert {word for word in bench if word.startswith("--")} <= options


def test_the_environment_and_steps() -> None:
    (serve,) = _dry("mixtral-8x7b", "serve", MODEL="/a folder", TP="4", PORT="1234")
    given = dict(itertools.pairwise(serve))
    assert (given["--model-path"], given["--tp-size"], given["--port"]) == (
        "/a folder", "4", "1234",
    )  # fmt: skip
    (calibrate,) = _dry("mixtral-8x7b", "calibrate")
    assert calibrate[:2] == ["sere-sglang", "calibrate"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["x"], "no launch/models/x.sh"), ([], "Models:"), (["glm-4.5", "sreve"], "what is sreve?")],
)
def test_what_is_wrong_is_named(arguments: list[str], named: str) -> None:
    command = ["bash", str(ROOT / "launch" / "model.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and named in done.stderr and not done.stdout
