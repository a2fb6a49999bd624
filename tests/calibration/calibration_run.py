"""The real command, watched: keeps what the engine showed us, and presses Ctrl-C when asked.

usage: python -m tests.calibration.calibration_run KEPT TOKENS calibrate --model ...

KEPT receives the collected state from just before the sums are finished, when it still has every
MoE layer's input rows. With TOKENS > 0, SIGINT goes to the whole process group, as a terminal
sends it, once that many tokens have run.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from typing import Any

from sere_sglang import calibration
from sere_sglang.cli.main import app


def main() -> None:
    kept, interrupt_at = sys.argv.pop(1), int(sys.argv.pop(1))
    original = calibration.calibrate

    def calibrate(job: Any, *, progress: Callable[[int, int, str], None], stop: Any) -> Any:
        def show(done: int, total: int, what: str) -> None:
            progress(done, total, what)
            if what.startswith("computing similarities, layer 1/"):
                shutil.copy(job.partial, kept)
            if done and done == interrupt_at:
                os.killpg(os.getpgrp(), signal.SIGINT)

        return original(job, progress=show, stop=stop)

    calibration.calibrate = calibrate  # type: ignore[assignment]
    app()


if __name__ == "__main__":
    main()
