"""What stands in two places says the same: versions, pins, packages, links of the docs."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

import sere_sglang
from sere_sglang.options import OPTIONS
from tools.flag_table import with_table

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
LOCK = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.M))


def test_the_version_is_written_once() -> None:
    assert 'dynamic = ["version"]' in PROJECT and "\nversion = " not in PROJECT.split("[tool.")[0]
    assert metadata.version("sere-sglang") == sere_sglang.__version__
    assert f"## [{sere_sglang.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_pre_commit_has_the_tools_of_the_lock() -> None:
    pins = re.findall(r'"(\S+)==(\S+)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert ("ruff", LOCK["ruff"]) in pins
    assert all(LOCK.get(name, version) == version for name, version in pins)


def test_workflows_pin_every_action_and_know_no_secret() -> None:
    for file in (ROOT / ".github" / "workflows").iterdir():
        text = file.read_text()
        used = re.findall(r"uses: (\S+)(.*)", text)
        assert used, file
        for action, comment in used:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
            assert re.fullmatch(r" # v\d+(\.\d+)*", comment), action
        assert "secrets." not in text and "permissions:\n  contents: read" in text


def _tracked() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return set(listed.stdout.split())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_files_that_the_architecture_names_exist() -> None:
    """In backticks: a path in the repository or in the package, or a file of the folder before."""
    files = _tracked()
    names = {file.rsplit("/", 1)[-1] for file in files}
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`([\w./-]+\.(?:py|md|cpp|cu))`", text):
        known = name in files or f"sere_sglang/{name}" in files
        assert known or ("/" not in name and name in names), name


def test_the_readmes_table_of_flags_is_the_options() -> None:
    text = (ROOT / "README.md").read_text()
    assert with_table(text) == text, "run python -m tools.flag_table"
    assert all(f"| `{option.flag}" in text for option in OPTIONS.values())


def test_every_logger_is_used() -> None:
    for folder in ("sere_sglang", "patches", "benchmarks", "tools", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            assert "\nlogger = " not in text or "logger." in text.split("\nlogger = ")[1], file
