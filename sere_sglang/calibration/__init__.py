"""``sere-sglang calibrate``: runs a model over text and writes the profile.

`through_sglang` runs the model in SGLang, where `collector` sits in every worker; `layer_by_layer`
reads it one layer at a time with transformers' modules. Both keep the same `statistics`, of which
`result` makes a profile.
"""

from __future__ import annotations

from collections.abc import Callable

from sere_sglang.calibration.job import (
    CalibrationJob,
    Interrupted,
    Progress,
    check_job,
    default_out,
    existing_profile,
    prepare_device,
    revision_of,
)
from sere_sglang.calibration.result import build_profile
from sere_sglang.errors import SereError
from sere_sglang.files import one_writer
from sere_sglang.profile import SereProfile, save_profile

__all__ = [
    "CalibrationJob",
    "Interrupted",
    "Progress",
    "calibrate",
    "check_job",
    "default_out",
    "existing_profile",
    "revision_of",
]


def calibrate(
    job: CalibrationJob,
    *,
    progress: Progress = lambda done, total, what: None,
    stop: Callable[[], bool] = lambda: False,
) -> SereProfile:
    """Run the calibration and write ``job.out``. `stop` is asked between two sequences.

    Raises `SereError` for anything the user can fix, `Interrupted` when `stop` answers True.
    """
    check_job(job)
    prepare_device(job.device)
    if job.layer_by_layer:
        from sere_sglang.calibration.layer_by_layer import collect
    else:
        from sere_sglang.calibration.through_sglang import collect
    with one_writer(job.out):
        text, state, model = collect(job, progress, stop)
        profile = build_profile(job, text, state, model)
        try:
            save_profile(profile, job.out)
        except OSError as error:
            raise SereError(
                f"--out {job.out}: cannot be written ({error}); free some space and repeat the "
                f"command with --resume, everything is in {job.partial}"
            ) from None
        job.partial.unlink(missing_ok=True)
        for file in job.hidden_files:
            file.unlink(missing_ok=True)
        return profile
