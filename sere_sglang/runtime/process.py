"""What this scheduler process was asked for, and the one `SereRuntime` that it has."""

from __future__ import annotations

from sere_sglang.options import SereConfig
from sere_sglang.runtime.rank import SereRuntime

_asked: SereConfig | None = None
_current: SereRuntime | None = None
_given_up = False


def ask(config: SereConfig) -> None:
    """This process is to run SERE, once its model is there."""
    global _asked
    _asked = config


def asked() -> SereConfig | None:
    """What was asked of this process; None when it does not run SERE."""
    return _asked


def give_up() -> None:
    """SERE cannot be had, and is to be done without: this process is plain SGLang's from now on."""
    global _asked, _given_up
    _asked, _given_up = None, True


def has_given_up() -> bool:
    return _given_up


def start(runtime: SereRuntime) -> None:
    """From now on this process's."""
    global _current
    _current = runtime


def current() -> SereRuntime | None:
    """This process's runtime; None while its model loads, and when it does not run SERE."""
    return _current
