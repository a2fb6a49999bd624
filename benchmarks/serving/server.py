"""SGLang servers on the CPU engine of this machine, as child processes that always end."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

SGLANG = str(Path(sys.executable).with_name("sglang"))
ROOT = Path(__file__).resolve().parents[2]
CPU_ENGINE = {"SGLANG_USE_CPU_ENGINE": "1"}
IMPORTS_CHECKOUT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
"""Environment of a server that is to import modules of these benchmarks."""
CPU_FLAGS = [
    "--device=cpu",
    "--attention-backend=torch_native",
    "--disable-radix-cache",
    "--skip-server-warmup",
    "--max-total-tokens=16384",
    # SGLang's default leaves room in proportion to --chunked-prefill-size, as a GPU needs it.
    "--mem-fraction-static=0.5",
    "--random-seed=0",
    "--sleep-on-idle",
]


class Process(Protocol):
    """A server's first process, the leader of its process group; as ``subprocess.Popen``."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def die_with_parent() -> None:
    """In a new process: the system kills it when its parent has ended, however that ended."""
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def start_process(command: Sequence[str], env: Mapping[str, str], log: Path) -> Process:
    """Run `command` with `env` added to the environment and both outputs in `log`."""
    with log.open("w") as out:
        return subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


class Server:
    """A running server: `post` and `get` speak JSON to it. pid: of its first process."""

    def __init__(self, port: int, log: Path, pid: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.pid = pid

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any], timeout: float = 300) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)

    def generate(self, prompts: list[str], max_new_tokens: int, **extra: Any) -> list[Any]:
        """Greedy generation of all prompts as one batch, with output token log-probabilities."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        return self.post(
            "/generate",
            {"text": prompts, "sampling_params": sampling, "return_logprob": True, **extra},
        )

    def set_sere(self, **changes: Any) -> None:
        """Change live settings through SGLang's ``/set_internal_state``."""
        answer = self.post("/set_internal_state", {"server_args": {"sere": changes}})
        if not all(answer):
            raise RuntimeError(f"/set_internal_state refused {changes}: see {self.log}")

    def sere(self) -> dict[str, Any]:
        """Live SERE state of the first rank."""
        return self.get("/server_info")["internal_states"][0]["sere"]


@contextlib.contextmanager
def serve(
    model: Path,
    log: Path,
    *flags: str,
    env: dict[str, str] | None = None,
    launcher: Sequence[str] = (SGLANG, "serve"),
    start: Callable[[Sequence[str], Mapping[str, str], Path], Process] = start_process,
) -> Iterator[Server]:
    """Start ``sglang serve`` on `model`, wait until it answers, and stop it at the end."""
    port = free_port()
    command = [*launcher, f"--model-path={model}", f"--port={port}", *CPU_FLAGS, *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    process = start(command, {**CPU_ENGINE, **(env or {})}, log)
    server = Server(port, log, process.pid)
    try:
        _wait_until_healthy(server, process)
        yield server
    finally:
        # At once: SGLang's own shutdown takes seconds, and there is nothing to lose.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    # Below 30000: SGLang derives further ports by adding to this one.
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = 20000 + probe.getsockname()[1] % 9000
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port")


def _wait_until_healthy(server: Server, process: Process) -> None:
    deadline = time.monotonic() + 900  # on a busy machine
    while time.monotonic() < deadline:
        status = process.poll()
        if status is not None:
            raise RuntimeError(f"server exited with {status}:\n{tail(server.log)}")
        try:
            urllib.request.urlopen(server.url + "/model_info", timeout=5).close()
            return
        except urllib.error.HTTPError as refusal:
            if refusal.code == 401:  # up, with an API key
                return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise RuntimeError(f"server not up in time:\n{tail(server.log)}")


def tail(log: Path, lines: int = 40) -> str:
    kept = [
        line for line in log.read_text(errors="replace").splitlines() if "server_args=" not in line
    ]
    return "\n".join(kept[-lines:])
