"""The rules' Triton kernels in Triton's interpreter, and through its compiler for a GPU.

In a process of its own: Triton decides when it sees a kernel which of the two it is for.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(*command: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_in_the_interpreter() -> None:
    files = [
        f"tests/gpu/{name}.py"
        for name in ("test_gpu_rules", "test_graph_rules", "test_triton_forms")
    ]
    out = run("-m", "pytest", *files, "-q", "-p", "no:cacheprovider", TRITON_INTERPRET="1")
    assert " passed" in out


def test_the_compiler_takes_them() -> None:
    """The interpreter accepts more than the compiler does. No GPU is needed."""
    out = run("-m", "launch.triton_check", "--arch", "sm_90", "--quick")
    assert "reroute_decode" in out and "rule_decode" in out and "outward_slots" in out
