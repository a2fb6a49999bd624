"""What this scheduler process was asked for, and the one `SereRuntime` that it has."""

from __future__ import annotations

from sere_sglang.options import SereConfig
from sere_sglang.runtime.rank import SereRuntime

_asked: SereConfig | None = None
_current: SereRuntime | None = None


def ask(config: SereConfig) -> None:
    """This process is to run SERE, once its model is there."""
    global _asked
    _asked = config


def asked() -> SereConfig | None:
    """What was asked of this process; None when it does not run SERE."""
    return _asked


def start(runtime: SereRuntime) -> None:
    """From now on this process's."""
    global _current
    _current = runtime


def current() -> SereRuntime | None:
    """This process's runtime; None while its model loads, and when it does not run SERE."""
    return _current
