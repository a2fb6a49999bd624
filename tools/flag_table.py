"""Writes the README's table of flags, which stands in sere_sglang/options.py.

usage: python -m tools.flag_table
"""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path

from sere_sglang.config import default_reads
from sere_sglang.option import Option
from sere_sglang.options import OPTIONS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- flags: python -m tools.flag_table -->\n", "<!-- end of flags -->\n"


def main() -> None:
    README.write_text(with_table(README.read_text()))


def with_table(text: str) -> str:
    """`text` with what lies between its two marks written anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = "".join(_row(option) for option in OPTIONS.values())
    return f"{before}{BEGIN}| flag | what it does | default |\n|---|---|---|\n{rows}{END}{after}"


def _row(option: Option) -> str:
    syntax = option.metavar or ("{on,off}" if option.switch else f"{{{','.join(option.names)}}}")
    flag = option.flag if syntax == "{}" else f"{option.flag} {syntax}"
    first = re.split(r"(?<=[a-z)])\. ", option.help)[0].rstrip(".")
    commands = re.split(r"'((?:sere-sglang|calibrate) [^']*)'", first)
    prose = [re.sub(r"(--[a-z-]+)", r"`\1`", text) for text in commands[::2]]
    quoted = [f"`{text}`" for text in commands[1::2]]
    help = "".join(part for pair in zip_longest(prose, quoted, fillvalue="") for part in pair)
    return f"| `{flag}` | {help} | {default_reads(option)} |\n"


if __name__ == "__main__":
    main()
