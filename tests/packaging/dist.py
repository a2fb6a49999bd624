"""What would be published: the sdist, and the wheel made from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "sere_sglang", "patches", "csrc")
GENERATED = ("*.egg-info", "__pycache__")


def build(folder: Path, **env: str) -> Path:
    """Returns the folder, below `folder`, that both are in; the checkout stays as it is. env: added
    to the environment."""
    source, dist = folder / "source", folder / "dist"
    source.mkdir()
    excluded = [f"--exclude={pattern}" for pattern in GENERATED]
    archive = subprocess.run(
        ["tar", "c", *excluded, *SOURCES], cwd=ROOT, capture_output=True, check=True
    )
    subprocess.run(["tar", "x"], cwd=source, input=archive.stdout, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source],
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return dist
