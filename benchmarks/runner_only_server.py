"""``sglang serve`` without SERE, but with its CPU kernels: what re-routing is compared with.

On the CPU engine ``--moe-backend sere`` also replaces SGLang's MoE and its decode attention, which
makes steps faster by itself. Takes the flags of ``sglang serve``.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def main() -> None:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args

    try:
        launch_server(prepare_server_args(sys.argv[1:]), run_scheduler_process_func=run_scheduler)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def run_scheduler(*args: Any, **keywords: Any) -> None:
    """In the scheduler process."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    from sere_sglang.patches import cpu_attention, cpu_moe

    cpu_attention.install()
    cpu_moe.install()
    run_scheduler_process(*args, **keywords)


if __name__ == "__main__":
    main()
