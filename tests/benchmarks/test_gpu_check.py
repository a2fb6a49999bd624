"""``launch/gpu_check.sh`` where it can end at once; a run without a GPU takes half a minute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import gpu_tests

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("script", ["gpu_check.sh", "gpu_wheels.sh", "compile_check.sh"])
def test_is_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)


def test_says_when_there_is_no_torch(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "No module named torch" >&2; exit 1\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "launch" / "gpu_check.sh"],
        env=os.environ | {"SERE_PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "No module named torch" in done.stdout
    assert "has no working torch" in done.stderr


def test_what_a_stopped_process_has_reported_counts() -> None:
    log = """tests/gpu/test_a.py::test_sizes[60-4-1] PASSED [ 10%]
tests/gpu/test_a.py::test_graph[cuda] FAILED                    [ 20%]
tests/gpu/test_a.py::test_graph[triton] SKIPPED (no GPU)        [ 30%]
tests/gpu/test_a.py::test_streams """
    assert gpu_tests.counts(log.splitlines()) == {"passed": 1, "failed": 1, "skipped": 1}


def test_shards_run_every_test_once() -> None:
    """In processes of their own, as on a GPU machine; here all of them say why they are skipped."""

    def collected(shard: str | None) -> set[str]:
        env = {**os.environ, "SERE_TEST_SHARD": shard} if shard else dict(os.environ)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "tests/gpu", "--collect-only", "-q"],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        return {line for line in done.stdout.splitlines() if "::" in line}

    first, second = collected("0/2"), collected("1/2")
    assert first and second and not first & second
    assert first | second == collected(None)


def test_ops_import_nothing_beyond_torch() -> None:
    """A GPU machine without this project's other dependencies can use and measure the kernels."""
    code = """
import sys, torch
before = set(sys.modules)
import sere_sglang.ops, benchmarks.op, benchmarks.moe_layer
new = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(sorted(name for name in new if not name.startswith("_")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['benchmarks', 'sere_sglang']"
