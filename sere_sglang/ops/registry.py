"""Modules that implement one function each in its own way, by the name that ``impl=`` gives."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


class UnavailableError(RuntimeError):
    """The named implementation cannot serve this device on this machine."""


def load(modules: Mapping[str, str], name: str, device_type: str) -> Any:
    """The module of that name, imported and built.

    Args:
        modules: name -> module with ``is_available`` and ``build`` as dispatch.py has them.

    Raises:
        ValueError: no such name; the message lists what exists.
        UnavailableError: it exists, but not for this device or machine.
        BuildError: it did not compile.
    """
    if name not in modules:
        choices = ", ".join(["auto", *modules])
        raise ValueError(f"impl {name!r} is no implementation; choose one of: {choices}")
    try:
        module: Any = importlib.import_module(modules[name])
    except ImportError as error:
        raise UnavailableError(f"impl {name!r}: {error}") from error
    reason = module.is_available(device_type)
    if reason is not None:
        raise UnavailableError(f"impl {name!r}: {reason}")
    module.build()
    return module
