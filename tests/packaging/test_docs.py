"""The documents: generated ones are current, links and anchors lead somewhere, the site builds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools import cookbook_page, coverage_page, troubleshooting

ROOT = Path(__file__).resolve().parents[2]
DOCS = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "demo_model" / "README.md",
    *sorted((ROOT / "patches" / "upstream").glob("*.md")),
]
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")


def _text(path: Path) -> str:
    """Without code, which only looks like links."""
    return re.sub(r"`[^`\n]*`", "`x`", _FENCE.sub("", path.read_text()))


def _anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", _FENCE.sub("", path.read_text()), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    found |= dict.fromkeys(re.findall(r'<a (?:id|name)="([^"]+)"', path.read_text()), 0)
    return set(found)


@pytest.mark.parametrize("path", DOCS, ids=[str(path.relative_to(ROOT)) for path in DOCS])
def test_links_and_anchors_lead_somewhere(path: Path) -> None:
    for target in _LINK.findall(_text(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor and there.suffix == ".md":
            assert anchor in _anchors(there), f"{target}: of {sorted(_anchors(there))}"


def test_every_refusal_is_in_the_troubleshooting_page() -> None:
    assert troubleshooting.PAGE.read_text() == troubleshooting.page(), (
        "write it again: python -m tools.troubleshooting"
    )


def test_coverage_is_what_the_runs_saw() -> None:
    assert coverage_page.PAGE.read_text() == coverage_page.page(), (
        "write it again: python -m tools.coverage_page"
    )


def test_the_cookbook_has_every_launch_script() -> None:
    scripts = {path.stem for path in (ROOT / "launch" / "models").glob("*.sh")}
    assert cookbook_page.SHAPES.keys() == scripts
    assert cookbook_page.PAGE.read_text() == cookbook_page.page(), (
        "write it again: python -m tools.cookbook_page"
    )


def test_the_audits_tests_are_there() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", (ROOT / "docs" / "gpu-audit.md").read_text())
    assert len(named) > 25
    missing = [f"{f}::{n}" for f, n in named if f"def {n}(" not in (ROOT / f).read_text()]
    assert not missing


def test_troubleshooting_has_fixes() -> None:
    """A message that says what to do, or a section that does."""
    messages = list(troubleshooting._messages())
    assert len(messages) > 150
    own = sum(m.fix is not None for m in messages)
    assert own > 0.5 * len(messages), f"{own} of {len(messages)}"


def test_the_sites_pages_are_the_documents() -> None:
    text = re.sub(r"!!python/name:\S+", "name", (ROOT / "mkdocs.yml").read_text())
    site = yaml.safe_load(text)
    listed = [page for entry in site["nav"] for page in entry.values()]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert site["docs_dir"] == "docs" and site["strict"]


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="needs mkdocs-material")
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "index.html").is_file() and (
        tmp_path / "troubleshooting" / "index.html"
    ).is_file()
