"""What the server tests share: real servers (launch.local_server) and commands that must fail."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from launch.local_server import CPU_ENGINE, CPU_FLAGS, SGLANG, Server, free_port, serve, tail

__all__ = ["CPU_ENGINE", "Server", "free_port", "refusal_of", "run_to_exit", "serve", "tail"]


def run_to_exit(
    *flags: str, env: dict[str, str] | None = None, warm_up: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run ``sglang serve`` with flags that must make it stop by itself.

    With `warm_up`, SGLang's first forward, which the other tests do without, happens.
    """
    command = [f for f in _command(*flags) if not (warm_up and f == "--skip-server-warmup")]
    return subprocess.run(
        command,
        env={**os.environ, **CPU_ENGINE, **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def refusal_of(*flags: str) -> subprocess.CompletedProcess[str]:
    """The same for flags refused before any process starts, without importing SGLang again."""
    command = _command(*flags)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = {"argv": command, "stdout": str(out), "stderr": str(err)}
        stdin, stdout = _forking().stdin, _forking().stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        status = int(stdout.readline())
        return subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())


def _command(*flags: str) -> list[str]:
    return [SGLANG, "serve", f"--port={free_port()}", *CPU_FLAGS, *flags]


@functools.cache
def _forking() -> subprocess.Popen[str]:
    """Ends with this process, whose end closes its standard input."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forked_cli.py"))],
        env={**os.environ, **CPU_ENGINE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
