"""Entry point ``sglang.srt.plugins: sere``, the table of contents of the integration.

In every process SGLang calls `register`, which only teaches SGLang the flags and a way in.
Nothing inside the scheduler is touched unless the server was started with
``--moe-backend sere``; then `install` runs before the scheduler is built.

    launcher    patches.server_args   flags, --config, Engine keywords, early checks
                patches.dp_controller passes the handshake on with --dp-size
    scheduler   patches.scheduler     installs the rest, reports SERE in the ready handshake
                patches.weight_files  keeps a profile in the model folder out of the weights
                patches.model_runner  binds stages after the weights load; one control write
                                      before each forward
                patches.moe_rows      whose rows a MoE layer sees (DP attention, all-to-all)
                patches.rank_decision what one rank measured reaches all ranks
                patches.topk          re-routes right after top-k, or in one launch with it
                patches.cpu_moe       CPU engine: our MoE runner
                patches.internal_state /server_info and /set_internal_state
    every hook  patches.guard         what happens when one fails while the server serves
"""

from __future__ import annotations


def register() -> None:
    """Called by ``sglang.srt.plugins.load_plugins`` in each process; SGLang applies the hooks."""
    from sere_sglang.patches import dp_controller, scheduler, server_args

    scheduler.register()
    dp_controller.register()
    server_args.register()  # last: SGLang skips a plugin that fails, and then knows no flag of ours
