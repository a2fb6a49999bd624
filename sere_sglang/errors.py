"""The one error type users see: one or two lines that name the flag or file and the fix."""

from __future__ import annotations


class SereError(ValueError):
    """SERE was asked for and cannot be given as asked."""
