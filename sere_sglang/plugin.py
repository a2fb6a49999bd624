"""Entry point ``sglang.srt.plugins: sere``: the way into SGLang.

In every process SGLang calls `register`, which only teaches SGLang the flags and a way in.
Nothing inside the scheduler is touched unless the server was started with
``--moe-backend sere``; then patches/scheduler.py installs the rest before the scheduler is built.

Every symbol of SGLang that is hooked, why, and when the hook may go: `sere_sglang.patches.PATCHES`
(patches/__init__.py). How data flows through them: docs/architecture.md.
"""

from __future__ import annotations


def register() -> None:
    """Called by ``sglang.srt.plugins.load_plugins`` in each process; SGLang applies the hooks."""
    from sere_sglang.patches import dp_controller, moe_runner, scheduler, server_args

    scheduler.register()
    dp_controller.register()
    moe_runner.register()
    server_args.register()  # last: SGLang skips a plugin that fails, and then knows no flag of ours
