"""``launch/gpu_check.sh`` where it can end at once; a run without a GPU takes half a minute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_ops_import_nothing_beyond_torch() -> None:
    """A GPU machine without this project's other dependencies can use and measure the kernels."""
    code = """
import sys, torch
before = set(sys.modules)
import sere_sglang.ops, benchmarks.op, benchmarks.moe_layer, benchmarks.rules
new = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(sorted(name for name in new if not name.startswith("_")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['benchmarks', 'sere_sglang']"
