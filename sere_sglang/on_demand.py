"""``--sere-profile auto``: a server that calibrates its model first, where nobody has."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from sere_sglang.errors import SereError
from sere_sglang.profile import AUTO, MoeModelInfo, default_place
from sere_sglang.profile.model_files import downloaded


def calibrated(model: MoeModelInfo, flags: Sequence[str], server_args: Sequence[str]) -> Path:
    """Where ``sere-sglang calibrate`` writes this model's profile; runs it unless that is there.

    In a process of its own, which loads the model and ends; its progress is shown. `flags` are
    calibrate's, `server_args` SGLang's. What an earlier start left unfinished is continued, and
    of several servers one calibrates. Raises `SereError`, and `SystemExit` at Ctrl-C.
    """
    whole = MoeModelInfo.from_folder(str(downloaded(model.name, model.revision)))
    out = default_place(dataclasses.replace(whole, name=model.name, revision=model.revision))
    lock = FileLock(f"{out}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise SereError(
            f"--sere-profile {AUTO}: cannot write {out} ({error}); set SERE_CACHE_DIR to a folder "
            "that may be written, or name a profile"
        ) from None
    try:
        if not out.is_file():
            _calibrate(model, out, flags, server_args)
    finally:
        lock.release()
    return out


def _calibrate(
    model: MoeModelInfo, out: Path, flags: Sequence[str], server_args: Sequence[str]
) -> None:
    command = [sys.executable, "-m", "sere_sglang.cli.main", "calibrate", f"--model={model.name}"]
    command += [f"--out={out}", *flags]
    if out.with_name(f"{out.name}.partial").exists():
        command.append("--resume")
    print(
        f"--sere-profile {AUTO}: {model.name} has no profile yet; calibrating it, once, before "
        f"serving ({out})",
        file=sys.stderr,
        flush=True,
    )
    before = signal.getsignal(signal.SIGINT)
    child = subprocess.Popen([*command, "--", *server_args])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child keeps what is done, and says so
    try:
        status = child.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if status in (130, -signal.SIGINT):
        raise SystemExit(130)
    if status != 0:
        raise SereError(
            f"--sere-profile {AUTO}: calibrating {model.name} failed, and the log says why; once "
            "that is fixed, start the server again, or write the profile with '"
            f"sere-sglang calibrate --model {model.name}' and drop the flag"
        )
