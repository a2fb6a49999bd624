"""SGLang servers, found at a URL or started here as child processes that always end."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
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

from sere_sglang.errors import PATH_SHOWN, SereError, cut
from sere_sglang.names import FALLBACK

SGLANG = str(Path(sys.executable).with_name("sglang"))
CPU_ENGINE = {"SGLANG_USE_CPU_ENGINE": "1"}
CPU_FLAGS = [
    "--device=cpu",
    "--attention-backend=torch_native",
    "--disable-radix-cache",
    "--skip-server-warmup",
    "--max-total-tokens=16384",
    # What others take of the memory while a model loads counts against it; SGLang's default leaves
    # room in proportion to --chunked-prefill-size, as a GPU needs it. The cache is bounded above.
    "--mem-fraction-static=0.9",
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


def start_process(
    command: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path | None = None
) -> Process:
    """Run `command` with `env` added to the environment and both outputs in `log`."""
    with log.open("w") as out:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **env},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


NO_LOG = Path(os.devnull)


class Server:
    """A running server: `post` and `get` speak JSON to it. log, pid (of its first process): of one
    that was started here."""

    def __init__(
        self, url: str, log: Path = NO_LOG, api_key: str | None = None, pid: int = 0
    ) -> None:
        self.url = url.rstrip("/")
        self.log = log
        self.pid = pid
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str, timeout: float = 60) -> Any:
        request = urllib.request.Request(self.url + path, headers=self.headers)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any], timeout: float = 300) -> Any:
        headers = {"Content-Type": "application/json"} | self.headers
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
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
            raise RuntimeError(f"/set_internal_state refused {changes}: see the log of {self.url}")

    def sere(self) -> dict[str, Any]:
        """Live SERE state of the first rank."""
        return self.get("/server_info")["internal_states"][0]["sere"]


def live_state(server: Server) -> dict[str, Any]:
    """`Server.sere` of a server that somebody named. Raises `SereError`, naming its URL."""
    try:
        info = server.get("/server_info", timeout=10)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise SereError(
            f"no SGLang server answers at {cut(server.url, PATH_SHOWN)} "
            f"({cut(str(error), PATH_SHOWN)}); name one that runs, and its key with --api-key if "
            "it has one"
        ) from None
    if not isinstance(info, dict):
        raise SereError(f"{cut(server.url, PATH_SHOWN)} is no SGLang server: name one that runs")
    state = (info.get("internal_states") or [{}])[0].get("sere")
    if state is None:
        reason = cut(str(info.get(FALLBACK, "it was not asked for")), PATH_SHOWN)
        raise SereError(f"the server at {server.url} runs without --moe-backend sere ({reason})")
    return state


class NotServing(RuntimeError):
    """A server that ended, or never answered, instead of serving; the message ends with its log."""

    def __init__(self, what: str, log: Path) -> None:
        super().__init__(f"{what}:\n{tail(log)}")
        self.what = what
        self.log = log


@contextlib.contextmanager
def serve(
    model: Path | str,
    log: Path,
    *flags: str,
    device: str = "cpu",
    api_key: str | None = None,
    env: dict[str, str] | None = None,
    launcher: Sequence[str] = (SGLANG, "serve"),
    start: Callable[[Sequence[str], Mapping[str, str], Path], Process] = start_process,
) -> Iterator[Server]:
    """Start ``sglang serve`` on `model`, wait until it answers, and stop it at the end.

    device: ``cpu`` for SGLang's CPU engine, ``cuda`` for what SGLang chooses by itself. Raises
    `NotServing`.
    """
    port = free_port()
    ours, variables = (CPU_FLAGS, CPU_ENGINE) if device == "cpu" else ([], {})
    command = [*launcher, f"--model-path={model}", f"--port={port}", *ours, *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    process = start(command, {**variables, **(env or {})}, log)
    server = Server(f"http://127.0.0.1:{port}", log, api_key, process.pid)
    try:
        _wait_until_healthy(server, process, log)
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


def _wait_until_healthy(server: Server, process: Process, log: Path) -> None:
    deadline = time.monotonic() + 1800  # on a busy machine, or a large model
    while time.monotonic() < deadline:
        status = process.poll()
        if status is not None:
            raise NotServing(f"server exited with {status}", log)
        try:
            server.get("/model_info", timeout=5)
            return
        except urllib.error.HTTPError as refusal:
            if refusal.code == 401:  # up, with an API key
                return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise NotServing("server not up in time", log)


def tail(log: Path, lines: int = 40) -> str:
    kept = [
        line for line in log.read_text(errors="replace").splitlines() if "server_args=" not in line
    ]
    return "\n".join(kept[-lines:])
