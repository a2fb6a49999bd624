"""The ``sere-sglang`` command, run in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from sere_sglang.cli.main import app

WIDE = {"COLUMNS": "200", "TERM": "dumb"}


def run(*arguments: str) -> tuple[int, str]:
    """Exit status; stdout and stderr together."""
    result = CliRunner().invoke(app, list(arguments), env=WIDE)
    return result.exit_code, result.output
