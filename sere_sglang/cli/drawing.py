"""Pictures are an extra: a server needs none."""

from __future__ import annotations

import importlib.util

from sere_sglang.errors import SereError


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib(asked: str) -> None:
    """Raise `SereError`, naming what was `asked` and the extra, when it is not installed."""
    if not can_draw():
        raise SereError(
            f"{asked} draws with matplotlib, which is not here: pip install 'sere-sglang[plot]'"
        )
