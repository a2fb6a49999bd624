"""What the server tests share: real servers (launch.local_server) and tiny checkpoints."""

from __future__ import annotations

import os
import subprocess

from launch.local_server import CPU_ENGINE, CPU_FLAGS, SGLANG, Server, free_port, serve, tail

__all__ = ["CPU_ENGINE", "Server", "free_port", "run_to_exit", "serve", "tail"]


def run_to_exit(*flags: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``sglang serve`` with flags that must make it stop by itself."""
    command = [SGLANG, "serve", f"--port={free_port()}", *CPU_FLAGS, *flags]
    return subprocess.run(
        command,
        env={**os.environ, **CPU_ENGINE, **(env or {})},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
