"""What the server tests share: real servers (sere_sglang.measure) and commands that must fail."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.experiment import IMPORTS_CHECKOUT, TWO_RANKS
from sere_sglang.measure import server as local_server
from sere_sglang.measure.server import (
    CPU_ENGINE,
    CPU_FLAGS,
    SGLANG,
    Server,
    free_port,
    tail,
)

__all__ = [
    "CPU_ENGINE",
    "SERE",
    "TWO_RANKS",
    "Server",
    "free_port",
    "refusal_of",
    "run",
    "run_to_exit",
    "serve",
    "tail",
    "told_by",
]

WHOLE_BATCHES = "--enable-tokenizer-batch-encode"
"""SGLang's scheduler gets the texts of one request in one message, so that however busy the machine
is they decode together. SGLang takes no token ids with it, and under DP attention it gives every
text to the first rank."""


@contextlib.contextmanager
def serve(
    model: Path | str,
    log: Path,
    *flags: str,
    whole_batches: bool = True,
    fork_workers: bool = True,
    **how: Any,
) -> Iterator[Server]:
    """As `measure.server.serve`, with `WHOLE_BATCHES`; its processes fork from one that imported
    SGLang, unless `how` has a ``start``. With `fork_workers` off, SGLang's workers are spawned, as
    users have them."""
    given = [WHOLE_BATCHES, *flags] if whole_batches else flags
    start = functools.partial(Forked.start, fork_workers=fork_workers)
    with local_server.serve(model, log, *given, **{"start": start} | how) as server:
        yield server


SERE = ("--moe-backend=sere", "--sere-primary-k=1")


def run_to_exit(
    *flags: str, env: dict[str, str] | None = None, warm_up: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run ``sglang serve``, in a process of its own, with flags that must make it stop by itself.

    With `warm_up`, SGLang's first forward, which the other tests do without, happens.
    """
    command = [f for f in _command(*flags) if not (warm_up and f == "--skip-server-warmup")]
    return subprocess.run(
        command,
        env={**os.environ, **CPU_ENGINE, **(env or {})},
        capture_output=True,
        text=True,
        timeout=6000,
        check=False,
    )


def refusal_of(
    *flags: str,
    env: Mapping[str, str] | None = None,
    warm_up: bool = False,
    fork_workers: bool = True,
) -> subprocess.CompletedProcess[str]:
    """The same without importing SGLang again."""
    command = [f for f in _command(*flags) if not (warm_up and f == "--skip-server-warmup")]
    return run(command, env, fork_workers=fork_workers)


def run(
    command: Sequence[str], env: Mapping[str, str] | None = None, *, fork_workers: bool = True
) -> subprocess.CompletedProcess[str]:
    """A command line of Python's, to its end, without importing SGLang again."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = Forked.start(command, env or {}, out, err, fork_workers=fork_workers)
        status = process.wait(timeout=6000)
        return subprocess.CompletedProcess(list(command), status, out.read_text(), err.read_text())


def told_by(script: Path, *arguments: str, **env: str) -> dict[str, Any]:
    """The JSON in the last line of what a script prints, in a process of its own: hooks, Triton's
    interpreter and SGLang's global state stay there."""
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, **CPU_ENGINE, **IMPORTS_CHECKOUT, **env},
        capture_output=True,
        text=True,
        timeout=6000,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    told: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return told


def _command(*flags: str) -> list[str]:
    return [SGLANG, "serve", f"--port={free_port()}", *CPU_FLAGS, *flags]


class Forked:
    """A command line that `forked_cli` runs; as ``subprocess.Popen``."""

    def __init__(self, pid: int, status: Path) -> None:
        self.pid = pid
        self._status = status

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        errors: Path | None = None,
        *,
        fork_workers: bool = True,
    ) -> local_server.Process:
        """Both outputs go to `log`, or standard error to `errors`."""
        arguments = list(command[command[0] == sys.executable :])
        log.write_text("")
        status = Path(_statuses().name, f"{time.monotonic_ns()}")
        request: dict[str, Any] = {"argv": arguments, "env": dict(env), "status": str(status)}
        # SGLang starts replicas from a thread each. What is forked while another thread forks too
        # may wait for ever for what that one held.
        replicas = any(argument.startswith("--dp-size") for argument in arguments)
        request |= {"fork_workers": fork_workers and not replicas}
        request |= {"stdout": str(log), "stderr": str(errors or log)}
        stdin, stdout = _forking().stdin, _forking().stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return cls(int(stdout.readline()), status)

    def poll(self) -> int | None:
        return int(self._status.read_text()) if self._status.exists() else None

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or float("inf"))
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            time.sleep(0.05)
        return status


@functools.cache
def _statuses() -> Any:
    return tempfile.TemporaryDirectory()


def _python_path() -> str:
    root = Path(__file__).resolve().parents[2]
    return os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])


@functools.cache
def _forking() -> subprocess.Popen[str]:
    """Ends with this process, whose end closes its standard input."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forked_cli.py"))],
        env={**os.environ, **CPU_ENGINE, "PYTHONPATH": _python_path()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
