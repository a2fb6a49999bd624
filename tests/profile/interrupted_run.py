"""The real command with a Ctrl-C at a known moment: SIGINT to the whole process group, as a
terminal sends it, once TOKENS tokens have run.

usage: python -m tests.profile.interrupted_run TOKENS calibrate --model ...
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from sere_sglang import calibration
from sere_sglang.cli.main import app


def main() -> None:
    tokens = int(sys.argv.pop(1))
    original = calibration.calibrate

    def calibrate(job: Any, *, progress: Callable[[int, int, str], None], stop: Any) -> Any:
        def show(done: int, total: int, what: str) -> None:
            progress(done, total, what)
            if done == tokens:
                os.killpg(os.getpgrp(), signal.SIGINT)

        return original(job, progress=show, stop=stop)

    calibration.calibrate = calibrate
    app()


if __name__ == "__main__":
    main()
