"""``sere-sglang inspect``: what a profile says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(profile: Annotated[Path, typer.Argument(help="Profile to look at.")]) -> None:
    """Print a profile's provenance and its statistics per layer."""
