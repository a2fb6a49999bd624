"""``sglang`` imported once and forked per Python command line.

The same entry points on the same command lines, without seconds of imports for each. Reads one
JSON request per line and answers with a process id; the exit status goes to the file that the
request names. What a command starts itself (SGLang's workers) is spawned as ever, or forked where
the request says so: nothing that the tests look at depends on which, but for a plugin's
registration in a fresh process, and the servers that most tests share are spawned.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

# What SGLang imports before it loads plugins, builds its ServerArgs and starts workers; then what a
# worker imports to load its model (every model file), and plugins with all that they may hook.
import sglang.cli.serve
import sglang.launch_server
import sglang.srt.arg_groups.pipeline
import sglang.srt.entrypoints.http_server
import sglang.srt.model_executor.model_runner
import sglang.srt.models.registry
import sglang.srt.server_args  # noqa: F401
import torch

import sere_sglang.patches.server_args  # noqa: F401
from sere_sglang.measure.server import die_with_parent

_status_files: dict[int, str] = {}


def main() -> None:
    # stdout is the channel to the tests: keep it from SGLang's prints.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    assert threading.active_count() == 1, "cannot fork safely"
    signal.signal(signal.SIGCHLD, _reap)
    for line in sys.stdin:
        request = json.loads(line)
        # An exit must find its status file noted.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if pid == 0:
            _run(request)
        _status_files[pid] = request["status"]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        answers.write(f"{pid}\n")


def _fork_workers() -> None:
    """What SGLang would spawn is forked: most of a start is each process importing SGLang."""
    set_start_method = multiprocessing.set_start_method

    def fork_for_spawn(method: str | None, force: bool = False) -> None:
        set_start_method("fork" if method == "spawn" else method, force)

    multiprocessing.set_start_method = fork_for_spawn
    # A process that has OpenMP threads cannot hand them on to one it forks, whose first parallel
    # loop would wait for them for ever. So the launcher has none; its workers start their own.
    threads = torch.get_num_threads()
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)


def _reap(_signal: int, _frame: Any) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            file = Path(_status_files.pop(ended[0]))
            unfinished = file.with_suffix(".unfinished")
            with contextlib.suppress(FileNotFoundError):  # nobody waits any more
                unfinished.write_text(str(os.waitstatus_to_exitcode(ended[1])))
                unfinished.rename(file)


def _run(request: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    os.setsid()
    die_with_parent()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = list(request["argv"])
    os.environ.update(request["env"])
    sys.path[1:1] = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    if threads := request["env"].get("OMP_NUM_THREADS"):  # OpenMP read its own long ago
        torch.set_num_threads(int(threads))
    if "SGLANG_EXTERNAL_MODEL_PACKAGE" in request["env"]:
        del sys.modules["sglang.srt.models.registry"]  # which registers it as it is imported
    status = 0
    if request["fork_workers"]:
        _fork_workers()
    try:
        with (
            open(1, "w", closefd=False) as out,
            open(2, "w", buffering=1, closefd=False) as errors,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            if sys.argv[0] == "-m":
                del sys.argv[0]
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        status = 1
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
