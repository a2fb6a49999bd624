"""Similarity-based expert re-routing (SERE) for SGLang: ``sglang serve --moe-backend sere``."""

from __future__ import annotations

__version__ = "0.1.0"
