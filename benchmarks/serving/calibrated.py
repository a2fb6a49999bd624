"""Profiles with surrogates, made by the real command where there is none yet."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sere_sglang.profile import load_profile


def shipped(model: Path) -> Path | None:
    """The profile in the model's folder, if it has surrogates."""
    profile = model / "sere_profile.safetensors"
    if not profile.exists():
        return None
    tables = load_profile(profile).tables.values()
    return profile if all("surrogate_bias" in own for own in tables) else None


def calibrated(
    model: Path,
    out: Path,
    data: Path | None,
    *,
    tokens: int = 65536,
    measures: Sequence[str] = ("frobenius",),
) -> Path:
    """`out`, calibrated unless it exists; goes on where it was stopped. Exits if it cannot be."""
    if out.exists():
        return out
    command = [sys.executable, "-m", "sere_sglang.cli.main", "calibrate", f"--model={model}"]
    command += [f"--out={out}", "--surrogate-rank=auto", f"--tokens={tokens}"]
    command += [f"--measure={measure}" for measure in measures]
    if data is not None:
        command.append(f"--data={data}")
    if out.with_name(f"{out.name}.partial").exists():
        command.append("--resume")
    print(f"calibrating: {' '.join(command[2:])}", file=sys.stderr)
    if status := subprocess.run(command, check=False).returncode:
        sys.exit(status)
    return out


def own_text(model: Path) -> Path | None:
    """The calibration text beside a model of this repository."""
    text = model / "data" / "calibration.txt"
    return text if text.exists() else None
