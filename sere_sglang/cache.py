"""Where this user's machine keeps what takes long to make: built kernels, calibrated profiles."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``SERE_CACHE_DIR``, or ``sere-sglang`` in the user's cache folder; need not exist."""
    configured = os.environ.get("SERE_CACHE_DIR")
    if configured:
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sere-sglang"
