"""Progress of a measurement: a bar on a terminal, a line per kind of work in a log file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def counted(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """`advance(what)` counts one of `total` as done, of the work named `what`."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description:22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("measuring", total=total)
        told = ""

        def advance(what: str) -> None:
            nonlocal told
            bar.update(task, description=what, advance=1)
            if what != told and not console.is_terminal:
                console.print(f"{what} ...", highlight=False)
            told = what

        yield advance
