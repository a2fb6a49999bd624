"""The one error type users see: one or two lines that name the flag or file and the fix."""

from __future__ import annotations

LONGEST_PATH = 240  # in a message; Linux has names of 255 at most
_SHOWN = 60


class SereError(ValueError):
    """SERE was asked for and cannot be given as asked."""


class ProfileError(SereError):
    """A profile that cannot be used, with the file and the fix."""


def shown(value: object) -> str:
    """`value` as an error message repeats it: its repr, cut where it gets long."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return "a number of more than 60 digits"  # whose repr Python may refuse
    if isinstance(value, (str, bytes)):
        value = value[: 2 * _SHOWN]
    return cut(repr(value))


def cut(text: str, limit: int = _SHOWN) -> str:
    """`text`, its end left out where it gets long."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
