"""What a server's log may not hold."""

from __future__ import annotations

import re
from pathlib import Path

_SIGNS = ("Traceback (most recent call last)", "SERE failed")

# SGLang's thread that freezes garbage collection after the start asks its server by HTTP, and logs
# that it failed where the server did not listen yet.
_START = re.compile(r"post-warmup freeze_gc failed\n(?:(?!\[20\d\d-).*\n)*")


def trouble_in(log: Path) -> str | None:
    """The first of it with its surroundings."""
    text = _START.sub("", log.read_text(errors="replace"))
    found = [at for at in map(text.find, _SIGNS) if at >= 0]
    return text[max(0, min(found) - 300) : min(found) + 3000] if found else None
