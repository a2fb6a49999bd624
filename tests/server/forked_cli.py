"""``sglang`` imported once and forked per command, for the many commands that must be refused.

The same entry points on the same command lines, without 15 s of imports for each. Reads one
JSON request per line; answers with the exit status.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
import threading

# What SGLang imports before it loads plugins and builds its ServerArgs.
import sglang.cli.serve
import sglang.launch_server
import sglang.srt.arg_groups.pipeline
import sglang.srt.server_args  # noqa: F401


def main() -> None:
    # stdout is the channel to the tests: keep it from SGLang's prints.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    assert threading.active_count() == 1, "cannot fork safely"
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(request)
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")


def _run(request: dict[str, str]) -> None:
    os.setsid()
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = list(request["argv"])
    status = 0
    try:
        with contextlib.redirect_stdout(open(1, "w")), contextlib.redirect_stderr(open(2, "w")):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        status = 1
        raise
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
