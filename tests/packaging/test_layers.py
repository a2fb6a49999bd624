"""Which module may import which, imports inside functions included (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "sere_sglang"
LAYERS = (
    ("cli",),
    ("plugin", "serve_backend"),
    ("calibration", "measure"),
    ("patches",),
    ("runtime",),
    ("cpu",),
    ("preflight", "on_demand"),
    ("config_check",),
    ("config",),
    ("schedule",),
    ("profile",),
    ("ops",),
    ("options",),
    ("names", "option", "files"),
    ("cache", "errors", "csrc"),
)
"""From the top: a layer imports those below it; those in one line do not know each other."""
KNOW_SGLANG = {"calibration", "cli", "measure", "patches", "plugin", "runtime", "serve_backend"}


def _modules() -> dict[str, Path]:
    folders = [(PACKAGE, ROOT / PACKAGE)]
    folders += [(f"{PACKAGE}.{name}", ROOT / name) for name in ("patches", "csrc")]
    found = {}
    for prefix, folder in folders:
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join((prefix, *(p for p in parts if p != "__init__")))
            found[name] = file
    return found


MODULES = _modules()


def _imports(file: Path) -> set[str]:
    """Full names that `file` imports anywhere, but for those that only annotations need."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: import by full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _module_of(name: str) -> str | None:
    """The module of ours that importing `name` imports."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


IMPORTS = {name: _imports(file) for name, file in MODULES.items()}
OURS = {
    name: {m for m in map(_module_of, found) if m not in (None, PACKAGE, name)}
    for name, found in IMPORTS.items()
}


def _part(module: str) -> str:
    return module.split(".")[1]


def test_every_part_has_a_layer() -> None:
    parts = {_part(name) for name in MODULES if name != PACKAGE}
    assert parts == {name for layer in LAYERS for name in layer}


def test_no_two_modules_import_each_other() -> None:
    try:
        TopologicalSorter(OURS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_import_runs_upwards() -> None:
    depth = {name: n for n, layer in enumerate(LAYERS) for name in layer}
    upwards = {
        (name, other)
        for name, others in OURS.items()
        if name != PACKAGE
        for other in others
        if _part(name) != _part(other) and depth[_part(name)] >= depth[_part(other)]
    }
    assert not upwards


def test_the_package_stands_without_what_stands_on_it() -> None:
    """And what measures it neither knows the scripts that run it, nor do both know the tests."""
    outside = {name: set(_imports_of_folder(name)) for name in ("benchmarks", "launch", "tools")}
    outside["package"] = {f.split(".")[0] for found in IMPORTS.values() for f in found}
    assert not outside["package"] & {"benchmarks", "launch", "tools", "tests"}
    assert not outside["benchmarks"] & {"launch", "tests"}
    assert not (outside["launch"] | outside["tools"]) & {"tests"}


def test_tests_import_each_other_in_one_way() -> None:
    """By their full names, so that no file is two modules; helpers, never a file of tests."""
    folder = ROOT / "tests"
    stems = {file.stem for file in folder.rglob("*.py")}
    for file in folder.rglob("*.py"):
        for name in _imports(file):
            first, *rest = name.split(".")
            assert first not in stems, f"{file}: {name} is tests.{name}"
            of_tests = any(part.startswith("test_") or part == "conftest" for part in rest)
            assert first != "tests" or not of_tests, f"{file}: {name}"


def _imports_of_folder(name: str) -> Iterator[str]:
    for file in (ROOT / name).rglob("*.py"):
        yield from (found.split(".")[0] for found in _imports(file))


@pytest.mark.parametrize("library", ["sglang", "matplotlib"])
def test_only_some_know(library: str) -> None:
    allowed = {
        "sglang": KNOW_SGLANG,
        "matplotlib": {"cli", "profile"},  # an extra, asked for by commands that draw
    }[library]
    knowing = {
        _part(name)
        for name, found in IMPORTS.items()
        if name != PACKAGE and any(f.split(".")[0] == library for f in found)
    }
    assert knowing <= allowed
