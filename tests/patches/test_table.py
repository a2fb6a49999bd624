"""The table of patches against the modules and hooks that there are. Starts no SGLang."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sere_sglang.patches import PATCHES, PINNED, PROCESS_STATE, TESTED_VERSIONS, TOOLS, Patch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "patches"


def hooked(source: str) -> set[str]:
    """The targets of every ``hook(...)`` and ``declare(...)`` in a module, constants resolved."""
    tree = ast.parse(source)
    constants: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = node.value
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            constants[node.target.id] = node.iter

    def texts(node: ast.expr) -> Iterator[str]:
        if isinstance(node, ast.Constant):
            yield str(node.value)
        elif isinstance(node, ast.Name):
            yield from texts(constants[node.id])
        elif isinstance(node, ast.Tuple):
            for element in node.elts:
                yield from texts(element)
        elif isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.FormattedValue) else p for p in node.values]
            yield "".join(next(texts(part)) for part in parts)
        else:
            raise AssertionError(f"not resolved: {ast.unparse(node)}")

    found: set[str] = set()
    for node in ast.walk(tree):
        name = (
            node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        )
        if isinstance(node, ast.Call) and name in ("hook", "declare"):
            found |= set(texts(node.args[0]))
    return found


def test_every_module_is_in_the_table_once() -> None:
    modules = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    assert sorted([*(patch.module for patch in PATCHES), *TOOLS]) == modules


@pytest.mark.parametrize("patch", PATCHES, ids=[patch.module for patch in PATCHES])
def test_the_hooks_are_those_of_the_module(patch: Patch) -> None:
    source = (FOLDER / f"{patch.module}.py").read_text()
    assert set(patch.hooks) == hooked(source)
    assert patch.hooks or patch.assigned
    for symbol in patch.assigned:
        assert symbol.rsplit(".", 1)[-1] in source
    assert patch.why.endswith(".") and patch.remove


def test_tools_hook_nothing() -> None:
    for module in TOOLS.keys() - {"seam"}:
        assert not hooked((FOLDER / f"{module}.py").read_text())


def test_every_pinned_attribute_is_listed() -> None:
    sources = [p for folder in ("patches", "sere_sglang") for p in (ROOT / folder).rglob("*.py")]
    text = "".join(p.read_text() for p in sources if p != FOLDER / "__init__.py")
    assert set(re.findall(r"[\"'.](_sere(?:_\w+)?)\b(?!\()", text)) - {"_sere_fields"} == set(
        PINNED
    )


def test_every_process_global_is_listed() -> None:
    found = set()
    for prefix, folder in (("sere_sglang", ROOT / "sere_sglang"), ("sere_sglang.patches", FOLDER)):
        for path in folder.rglob("*.py"):
            parts = (prefix, *path.relative_to(folder).with_suffix("").parts)
            tree = ast.parse(path.read_text())
            found |= {".".join((*parts, name)) for name in _rebound(tree) | _held(tree)}
    assert found == set(PROCESS_STATE)


def _rebound(tree: ast.Module) -> set[str]:
    return {n for node in ast.walk(tree) if isinstance(node, ast.Global) for n in node.names}


def _held(tree: ast.Module) -> set[str]:
    """Module variables that start as an empty container, or are the one object of a kind."""
    names = set()
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        empty = isinstance(node.value, ast.Dict | ast.List) and not ast.unparse(node.value)[1:-1]
        called = ast.unparse(node.value).split("(")[0] if isinstance(node.value, ast.Call) else ""
        if empty or called in ("set", "dict", "list", "torch.library.Library", "_Launcher"):
            names.add(ast.unparse(target))
    return names


def test_supported_versions_are_stated_once() -> None:
    asked = re.findall(r'"sglang\b([^"]*)",', (ROOT / "pyproject.toml").read_text())
    assert asked == [f">={TESTED_VERSIONS[0]},<0.6"]
    lock = (ROOT / "requirements.lock").read_text()
    assert re.findall(r"^sglang==(\S+)", lock, re.M) == [TESTED_VERSIONS[-1]]
    for path in FOLDER.glob("*.py"):
        claims = re.findall(r"\b0\.5\.\d+", path.read_text())
        assert claims == ([*TESTED_VERSIONS] if path.stem == "__init__" else []), path.name
