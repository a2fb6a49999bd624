"""Writes docs/troubleshooting.md from the sources: every refusal with its fix.

    python -m tools.troubleshooting            # write it
    python -m tools.troubleshooting --check    # status 1 if it is not current

A message is what stands in ``raise SereError(...)`` (and its subclasses, and the helpers that make
one), with what is known at run time only in capitals. Its fix is what follows the last semicolon,
or a colon and a verb.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
ERRORS = {"SereError", "ProfileError", "CannotTime", "SeamError"}
HELPERS = {"_unreadable", "_no_profile", "misshapen", "refused", "refuse"}
"""Functions that make or raise one out of what they are called with."""

AREAS = (
    ("Flags of the server", ("config", "preflight", "names", "options",
                             "patches/server", "patches/engine", "patches/shadow",
                             "patches/moe_rows", "cpu/isa",
                             "schedule/registry"),
     "The message names the flag: change its value, or drop it."),
    ("Live settings and requests", ("schedule/settings", "schedule/request_quality",
                                    "patches/http_server",
                                    "patches/number_keys", "patches/internal_state"),
     "Nothing was changed. Send a value in the range that the message names."),
    ("Profiles", ("profile/",), "Calibrate again, or copy the file again."),
    ("Cost files and traces", ("schedule/cost", "schedule/trace", "runtime/probe"),
     "Write the file again: `sere-sglang doctor --model MODEL --out FILE`, or `--sere-trace`."),
    ("Calibration", ("calibration/", "cli/calibrate", "patches/calibration"),
     "Change the option that the message names; `--resume` goes on with what is done."),
    ("SGLang and this machine", ("patches/", "runtime/", "ops/", "cpu/"),
     "Use a tested version of SGLang (`sere-sglang doctor`), or serve without "
     "`--moe-backend sere`."),
    ("Commands", ("cli/", "schedule/"), "See the command's `--help`."),
)  # fmt: skip
"""Heading, where its messages are raised (first match), and the fix where a message has none."""

_INTRO = """# Troubleshooting
<!-- Generated: python -m tools.troubleshooting -->
Every message with which sere-sglang refuses something, by what it is about, and what to do. What
stands in capitals is filled in when it happens. On a command line it is one line behind
`sere-sglang: error:` and exit status 2; over HTTP it is the message of a status 400; an `Engine`
raises it.

Once a server serves, an error in SERE does not stop it: it goes on with exact routing, the log says
`SERE failed and serving goes on`, `/server_info` has the reason under `failed`, and
`sglang:sere_failed` is 1. `{"server_args": {"sere": {"enabled": true}}}` to
`/set_internal_state` starts it again.
"""


_IMPERATIVES = frozenset(
    ("add", "change", "choose", "drop", "end", "expected", "install", "make", "must", "name", "run",
     "say", "serve", "use", "write")
)  # fmt: skip


@dataclass(frozen=True)
class Message:
    """text: one line. fix: what the message says itself, or None. where: module."""

    text: str
    fix: str | None
    where: str


def page() -> str:
    """The whole page."""
    messages = sorted(
        set(_messages()), key=lambda m: (m.text.lower(), m.text, m.fix or "", m.where)
    )
    parts = [_INTRO]
    for heading, _, fallback in AREAS:
        own = [m for m in messages if _area(m.where) == heading]
        parts.append(f"\n## {heading}\n{fallback}\n\n| message | fix |\n|---|---|\n")
        parts += [f"| {_cell(m.text)} | {_cell(m.fix or 'as above')} |\n" for m in own]
    return "".join(parts)


def _area(where: str) -> str:
    for heading, prefixes, _ in AREAS:
        if where.startswith(prefixes):
            return heading
    return AREAS[-1][0]


def _cell(text: str) -> str:
    text = text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*")
    return re.sub(r"__", r"\\_\\_", text)


def _messages() -> Iterator[Message]:
    for path in sorted((ROOT / "sere_sglang").rglob("*.py")) + sorted(
        (ROOT / "patches").glob("*.py")
    ):
        where = path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("sere_sglang/")
        if "sere_sglang/patches" in path.as_posix():  # a link to the other
            continue
        tree = ast.parse(path.read_text())
        strings = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, str)
        }
        for text in _texts(tree, strings):
            message = _split(text, where)
            if message is not None:
                yield message


def _split(text: str, where: str) -> Message | None:
    text = " ".join(text.split())
    if len(re.findall(r"[a-z]{2,}", text)) < 2:  # made of what somebody else says
        return None
    what, semicolon, fix = text.rpartition("; ")
    if not semicolon:
        what, colon, fix = text.rpartition(": ")
        if not colon or fix.split(" ")[0] not in _IMPERATIVES:
            return Message(text, None, where)
    end = "" if fix.endswith("?") else "."
    return Message(what, fix[0].upper() + fix[1:] + end, where)


def _texts(tree: ast.Module, strings: dict[str, str]) -> Iterator[str]:
    inside: dict[ast.AST, str] = {
        node: function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or inside.get(node) in HELPERS:
            continue
        name = _name(node.func)
        if name in ERRORS and node.args:
            yield _template(node.args[0], strings)
        elif name in HELPERS and node.args:
            own = [a for a in node.args if isinstance(a, (ast.JoinedStr, ast.Constant, ast.IfExp))]
            if own:
                yield from (_HELPED[name].format(x) for x in _choices(own[-1], strings))


_HELPED = {
    "_unreadable": "PATH: not a readable safetensors file ({}); calibrate again",
    "_no_profile": "PATH: {}; name a profile that 'sere-sglang calibrate' wrote",
    "misshapen": "PATH: NAME has shape SHAPE, expected {}; calibrate again",
    "refused": "--layer-by-layer: MODEL cannot be run by layers: {}; drop --layer-by-layer",
    "refuse": "--sere-cost FILE: {}; write one with 'sere-sglang doctor --model MODEL --out FILE'",
}


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _choices(node: ast.expr, strings: dict[str, str]) -> list[str]:
    if isinstance(node, ast.IfExp):
        return [_template(node.body, strings), _template(node.orelse, strings)]
    return [_template(node, strings)]


def _template(node: ast.expr, strings: dict[str, str]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(v.value)
            if isinstance(v, ast.Constant)
            else _placeholder(v.value if isinstance(v, ast.FormattedValue) else v, strings)
            for v in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left, strings) + _template(node.right, strings)
    return _placeholder(node, strings)


def _placeholder(node: ast.expr, strings: dict[str, str]) -> str:
    """What stands for a value that is known at run time only: a word in capitals."""
    if isinstance(node, ast.Name):
        return strings.get(node.id) or node.id.strip("_").upper()
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_").upper()
    if isinstance(node, ast.Call):
        name = _name(node.func)
        if name == "flag_of":
            return "--FLAG"
        if (
            name in ("shown", "cut", "str", "_short", "_plain", "repr", "sorted", "Path")
            and node.args
        ):
            return _placeholder(node.args[0], strings)
        if name == "join":
            return "NAMES"
        return name.strip("_").upper()
    if isinstance(node, (ast.JoinedStr, ast.Constant)):
        return _template(node, strings)
    if isinstance(node, ast.IfExp):
        return _placeholder(node.body, strings)
    if isinstance(node, ast.BoolOp):
        return _placeholder(node.values[0], strings)
    if isinstance(node, ast.Subscript):
        return _placeholder(node.value, strings)
    return "N"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is current")
    given = parser.parse_args()
    text = page()
    if given.check:
        current = PAGE.exists() and PAGE.read_text() == text
        sys.exit(0 if current else f"{PAGE.name} is not current: python -m tools.troubleshooting")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
