"""Similarity-based expert re-routing (SERE) for SGLang: ``sglang serve --moe-backend sere``.

``from sere_sglang import reroute`` gives the rules themselves, for any torch tensors
(docs/semantics.md). Importing this package imports neither torch nor SGLang.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sere_sglang.ops import reroute as reroute

__all__ = ["__version__", "reroute"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """PEP 562: torch is imported when `reroute` is first asked for."""
    if name != "reroute":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sere_sglang.ops import reroute

    globals()[name] = reroute
    return reroute


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
