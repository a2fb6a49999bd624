"""Scripts in launch/: --help says what one does and starts nothing; a wrong word is refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
# The others hand --help to a Python program, for which they set up the environment first.
EXPLAIN_THEMSELVES = (
    "calibrate",
    "compile_check",
    "gpu_check",
    "gpu_wheels",
    "model",
    "test",
    "train_demo",
)


def _run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Nothing to start: neither Python nor a compiler is found.
    environment = {**os.environ, "SERE_PYTHON": "/none", "CUDA_HOME": "/none"}
    return subprocess.run(
        ["bash", str(LAUNCH / f"{name}.sh"), *arguments],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("name", EXPLAIN_THEMSELVES)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_the_comment_at_the_head(name: str, flag: str) -> None:
    done = _run(name, flag)
    assert (done.returncode, done.stderr) == (0, "")
    head = (LAUNCH / f"{name}.sh").read_text().split("\n", 2)[1].removeprefix("# ")
    assert done.stdout.startswith(head + "\n")
    assert "BASH_SOURCE" not in done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpu_check", ["--fast"]),
        ("gpu_wheels", ["--fast"]),
        ("gpu_check", ["--quick", "--fast"]),
        ("model", ["mixtral-8x7b", "--fast"]),
    ],
)
def test_a_wrong_word_is_refused(name: str, words: list[str]) -> None:
    done = _run(name, *words)
    assert done.returncode == 2
    assert f"{name}.sh: what is --fast? see --help" in done.stderr


def test_two_steps_of_a_model_are_refused() -> None:
    done = _run("model", "mixtral-8x7b", "bench", "serve", "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert "bench or serve? one step at a time" in done.stderr


def test_without_a_model_calibrate_says_what_it_wants() -> None:
    done = _run("calibrate")
    assert (done.returncode, done.stdout) == (2, "")
    assert "bash launch/calibrate.sh MODEL" in done.stderr
