"""The ``sere-sglang`` command: one module per subcommand, which imports what it needs when run."""

from __future__ import annotations

import dataclasses

import typer

from sere_sglang.cli import calibrate, doctor, inspect, simulate, top
from sere_sglang.config import SereConfig, flag_of

_FLAGS = ", ".join(f"`{flag_of(f.name)}`" for f in dataclasses.fields(SereConfig))

app = typer.Typer(
    name="sere-sglang",
    help="Similarity-based expert re-routing for SGLang: faster batched decoding of MoE models.",
    epilog=(
        "Serving needs no command of ours: `sglang serve --model-path MODEL --moe-backend sere`. "
        f"The server's flags are {_FLAGS}; `python -m sglang.launch_server --help` describes "
        "them (`sglang serve --help` returns before SGLang loads plugins)."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("calibrate")(calibrate.command)
app.command("inspect")(inspect.command)
app.command("doctor")(doctor.command)
app.command("simulate")(simulate.command)
app.command("top")(top.command)


if __name__ == "__main__":
    app()
