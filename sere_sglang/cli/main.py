"""The ``sere-sglang`` command: one module per subcommand, imported when it is used."""

from __future__ import annotations

import typer

from sere_sglang.cli import calibrate, doctor, inspect

SERVER_FLAGS = """
Serving needs no command of ours: `sglang serve --model-path MODEL --moe-backend sere` re-routes
experts with MODEL/sere_profile.safetensors. The flags `--moe-backend`, `--sere-profile`,
`--sere-policy`, `--sere-primary-k`, `--sere-threshold`, `--sere-min-batch`, `--sere-max-batch`,
... are described by `python -m sglang.launch_server --help`
(`sglang serve --help` returns before it loads plugins).
"""

app = typer.Typer(
    name="sere-sglang",
    help="Similarity-based expert re-routing for SGLang: faster batched decoding of MoE models.",
    epilog=" ".join(SERVER_FLAGS.split()),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("calibrate")(calibrate.command)
app.command("inspect")(inspect.command)
app.command("doctor")(doctor.command)
