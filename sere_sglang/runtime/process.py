"""What this scheduler process was asked for, and the one `SereRuntime` that it has."""

from __future__ import annotations

from sere_sglang.options import SereConfig
from sere_sglang.runtime.rank import SereRuntime

_asked: SereConfig | None = None
_current: SereRuntime | None = None
_without: str | None = None


def ask(config: SereConfig) -> None:
    """This process is to run SERE, once its model is there."""
    global _asked
    _asked = config


def asked() -> SereConfig | None:
    """What was asked of this process; None when it does not run SERE."""
    return _asked


def serve_without(reason: str) -> None:
    """SERE cannot be had, and is to be done without: this process is plain SGLang's from now on."""
    global _asked, _without
    _asked, _without = None, reason


def reason_without() -> str | None:
    """Why this process does without SERE, which it was asked for; None where it does not."""
    return _without


def start(runtime: SereRuntime) -> None:
    """From now on this process's."""
    global _current
    _current = runtime


def current() -> SereRuntime | None:
    """This process's runtime; None while its model loads, and when it does not run SERE."""
    return _current
