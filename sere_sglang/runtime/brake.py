"""``--sere-max-kl``: what re-routing did to users' requests, and when it was too much."""

from __future__ import annotations

from sere_sglang.schedule.settings import Settings
from sere_sglang.schedule.shadow import ShadowReport


class Brake:
    """One per rank. Every rank gets the same reports between the same two steps.

    report: the last one; None before the first. pulled: why re-routing was switched off, until
    an operator switches it on again.
    """

    def __init__(self) -> None:
        self.report: ShadowReport | None = None
        self.pulled: str | None = None

    def pulls(self, report: ShadowReport, settings: Settings) -> bool:
        """Whether `report` is beyond what `settings` allow: its whole interval is."""
        self.report = report
        if not settings.enabled or settings.max_kl is None or report.low <= settings.max_kl:
            return False
        self.pulled = (
            f"shadow KL {report.kl:.4g} (at least {report.low:.4g}, {report.window_tokens} tokens) "
            f"is above max_kl {settings.max_kl:g}"
        )
        return True

    def release(self) -> None:
        self.pulled = None
