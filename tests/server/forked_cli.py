"""``sglang`` imported once and forked per command line.

The same entry points on the same command lines, without seconds of imports for each. Reads one
JSON request per line and answers with a process id; the exit status goes to the file that the
request names. What a command starts itself (SGLang's workers) is spawned as ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

# What SGLang imports before it loads plugins, builds its ServerArgs and starts workers.
import sglang.cli.serve
import sglang.launch_server
import sglang.srt.arg_groups.pipeline
import sglang.srt.entrypoints.http_server
import sglang.srt.server_args  # noqa: F401

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
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = list(request["argv"])
    os.environ.update(request["env"])
    sys.path[1:1] = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    status = 0
    try:
        with contextlib.redirect_stdout(open(1, "w")), contextlib.redirect_stderr(open(2, "w")):
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
