"""Names and paths on a terminal as they are: neither markup, nor emoji, nor control codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sere_sglang.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def literal(text: str, style: str = "") -> Text:
    """What rich renders as `text`."""
    from rich.text import Text

    return Text(printable(text), style)


def say(console: Console, text: str) -> None:
    """Print `text` as one line, however long."""
    console.print(literal(text), soft_wrap=True)
