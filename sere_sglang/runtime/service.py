"""What stands around one rank's SERE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sere_sglang.schedule.trace import TraceWriter

if TYPE_CHECKING:
    from sere_sglang.runtime.metrics import SereMetrics


@dataclass(frozen=True)
class Service:
    """What a rank is to the server around it.

    queue: its running and waiting requests.
    measures: this is the rank that receives requests.
    metrics: where it reports, if it does.
    trace: where every forward is written, if that was asked for.
    warms_up: the first forward belongs to the start: what fails in it stops the server.
    tells: tells the rank that receives requests of trouble; None when there is one rank.
    """

    queue: Callable[[], tuple[int, int]] = lambda: (0, 0)
    measures: bool = False
    metrics: SereMetrics | None = None
    trace: TraceWriter | None = None
    warms_up: bool = False
    tells: Callable[[str], None] | None = None
