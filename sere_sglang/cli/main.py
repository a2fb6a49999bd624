"""The ``sere-sglang`` command: one module per subcommand, which imports what it needs when run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import typer
from typer.core import TyperGroup

from sere_sglang.cli import bench, calibrate, doctor, evaluate, inspect, simulate, top, tune
from sere_sglang.errors import USER_ERROR, SereError, exit_on_error
from sere_sglang.options import OPTIONS

_FLAGS = ", ".join(f"`{option.flag}`" for option in OPTIONS.values())

# Of what a wrong flag raises typer exports one kind, and this is the base of all.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, so that the servers that a command started end with it."""

    def end(_signal: int, frame: Any) -> None:
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):  # ignored, as a shell has it for what runs in the background
            sys.exit(128 + signal.SIGTERM)
        interrupt(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Commands(TyperGroup):
    """Every subcommand reports what it was asked wrongly in one form, be it a flag's syntax."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        with exit_on_error(), terminated_as_interrupted():
            try:
                status = super().main(
                    args, prog_name, complete_var, False, windows_expand_args, **extra
                )
            except _UsageError as error:
                message = error.format_message()
                if not message:  # no argument at all: the help is printed already
                    sys.exit(USER_ERROR)
                where = error.ctx.command_path if error.ctx is not None else "sere-sglang"
                raise SereError(f"{message.rstrip('.')}; see {where} --help") from None
        sys.exit(status if isinstance(status, int) else 0)


app = typer.Typer(
    name="sere-sglang",
    cls=_Commands,
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
app.command("bench")(bench.command)
app.command("evaluate")(evaluate.command)
app.command("tune")(tune.command)
app.command("simulate")(simulate.command)
app.command("top")(top.command)


if __name__ == "__main__":
    app()
