"""Calibrates as a child process of the tests, and keeps the tokens that the engine showed us.

usage: python -m tests.profile.calibration_run MODEL TEXT OUT KEPT [measure ...]
KEPT receives the collected state from just before the sums are finished: it still has every MoE
layer's input rows.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sere_sglang.calibration import CalibrationJob, calibrate
from sere_sglang.profile.collection import CollectionSpec


def main() -> None:
    model, text, out, kept, *measures = sys.argv[1:]
    job = CalibrationJob(
        model=model,
        out=Path(out),
        spec=CollectionSpec(measures=tuple(measures), cka_tokens=400),
        data=(Path(text),),
        num_tokens=600,
        length=128,
        device="cpu",
    )

    def keep(_done: int, _total: int, what: str) -> None:
        if what.startswith("computing similarities, layer 1/"):
            shutil.copy(job.partial, kept)

    calibrate(job, progress=keep)


if __name__ == "__main__":
    main()
