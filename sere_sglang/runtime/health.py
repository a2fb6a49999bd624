"""Whether a rank goes on re-routing after something of ours has raised."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sere_sglang.errors import cut

logger = logging.getLogger(__name__)

_REASON = 300  # letters of why it failed, in /server_info


class Health:
    """One per rank.

    trouble: why this rank could not go on, set by the first `note`. failed: why all ranks have
        stopped re-routing, at the same step everywhere; with one rank both at once.
    attempt: counts how often an operator has started it again after a failure.
    """

    def __init__(self) -> None:
        self.trouble: str | None = None
        self.failed: str | None = None
        self.attempt = 0

    def note(self, where: str, error: Exception, tells: Callable[[str], None] | None) -> str:
        """Something of ours has raised. Warns once, and `tells` the rank that receives requests,
        where that is another. Returns why this rank cannot go on."""
        if self.trouble is None:
            self.trouble = cut(f"{where}: {type(error).__name__}: {error}", _REASON)
            logger.warning(
                "SERE failed and serving goes on with exact routing; start it again with "
                '/set_internal_state {"server_args": {"sere": {"enabled": true}}} (%s)',
                self.trouble,
                exc_info=error,
            )
            if tells is not None:
                tells(self.trouble)
        return self.trouble

    def end(self, reason: str) -> None:
        """Re-routing ends on all ranks."""
        if self.trouble is None:
            logger.warning("SERE stops, serving goes on with exact routing: %s", reason)
        self.trouble = self.failed = reason

    @property
    def has_failed(self) -> bool:
        """Now or before."""
        return self.trouble is not None or self.attempt > 0

    def start_again(self) -> None:
        self.trouble = self.failed = None
        self.attempt += 1
