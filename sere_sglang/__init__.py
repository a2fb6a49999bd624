"""Similarity-based expert re-routing (SERE) for SGLang: ``sglang serve --moe-backend sere``.

``from sere_sglang import reroute, apply_rule`` gives the rules themselves, for any torch tensors
(docs/semantics.md). Importing this package imports neither torch nor SGLang.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sere_sglang.ops import apply_rule as apply_rule
    from sere_sglang.ops import reroute as reroute

__all__ = ["__version__", "apply_rule", "reroute"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """PEP 562: torch is imported when one of the functions is first asked for."""
    if name not in ("apply_rule", "reroute"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sere_sglang import ops

    globals()[name] = getattr(ops, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
