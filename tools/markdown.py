"""What the pages that are generated have in common."""

from __future__ import annotations

from collections.abc import Iterable


def table_row(cells: Iterable[object]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"
