"""Text for the demo model: seven domains out of Debian packages, split into train and held-out.

The domains differ on purpose (verse, essays, manuals, code): experts specialise on them, so that
batches of one kind and of mixed kinds activate different experts. Every text is in the public
domain or under a permissive licence; nothing but Debian's archive is asked for it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

MAX_DOMAIN_BYTES = 6_000_000
HELDOUT_ONE_IN = 25
MAX_HELDOUT_BYTES = 60_000
MAX_CALIBRATION_BYTES = 60_000
MIN_DOCUMENT = 300


@dataclass(frozen=True)
class Domain:
    """One source. package: Debian package whose copyright file states the licence."""

    name: str
    package: str
    licence: str


DOMAINS = (
    Domain("scripture", "bible-kjv-text", "public domain (King James Version, 1611)"),
    Domain("jargon", "dict-jargon", "public domain (Jargon File 4.4.7)"),
    Domain("python-manual", "python3.11-doc", "Python Software Foundation License 2"),
    Domain("python-code", "libpython3.11-stdlib", "Python Software Foundation License 2"),
    Domain("postgres-manual", "postgresql-doc-15", "PostgreSQL License"),
    Domain("sqlite-manual", "sqlite3-doc", "public domain (SQLite)"),
    Domain("rust-manual", "rust-doc", "MIT or Apache-2.0"),
)
READERS = ("bible-kjv",)  # the program that unpacks the scripture's own compressed format


def build(folder: Path) -> dict[str, dict[str, list[str]]]:
    """`{split: {domain: documents}}` for train and heldout; cached in `folder`/corpus.json."""
    cached = folder / "corpus.json"
    if cached.exists():
        return json.loads(cached.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    roots = {package: _unpack(package, folder) for package in packages()}
    splits: dict[str, dict[str, list[str]]] = {"train": {}, "heldout": {}}
    for domain in DOMAINS:
        documents = _READ[domain.name](roots)
        for split in splits:
            splits[split][domain.name] = []
        sizes = dict.fromkeys(splits, 0)
        caps = {"train": MAX_DOMAIN_BYTES, "heldout": MAX_HELDOUT_BYTES}
        seen = set()
        # By hash, so that the split does not depend on the order files come in.
        for digest, text in sorted((hashlib.sha256(t.encode()).hexdigest(), t) for t in documents):
            if len(text) < MIN_DOCUMENT or digest in seen:
                continue
            seen.add(digest)
            split = "heldout" if int(digest[:8], 16) % HELDOUT_ONE_IN == 0 else "train"
            if sizes[split] < caps[split]:
                splits[split][domain.name].append(text)
                sizes[split] += len(text.encode())
        print(f"{domain.name:16} train {sizes['train']:9,} B   held out {sizes['heldout']:7,} B")
    cached.write_text(json.dumps(splits))
    return splits


def packages() -> tuple[str, ...]:
    return (*(d.package for d in DOMAINS), *READERS)


def versions(folder: Path) -> dict[str, str]:
    """`{package: version}` of what was downloaded."""
    found = {}
    for package in packages():
        archive = next((folder / "debs").glob(f"{package}_*.deb"))
        found[package] = archive.name.split("_")[1].replace("%3a", ":")
    return found


def _unpack(package: str, folder: Path) -> Path:
    root, debs = folder / "unpacked" / package, folder / "debs"
    if root.exists():
        return root
    debs.mkdir(exist_ok=True)
    if not list(debs.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", "-q", package], cwd=debs, check=True)
    partial = root.with_name(root.name + ".part")
    partial.mkdir(parents=True, exist_ok=True)
    archive = next(debs.glob(f"{package}_*.deb"))
    subprocess.run(["dpkg", "-x", str(archive), str(partial)], check=True)
    partial.rename(root)
    return root


def _scripture(roots: dict[str, Path]) -> Iterator[str]:
    program = roots["bible-kjv"] / "usr/bin/bible"
    data = roots["bible-kjv-text"] / "usr/lib"
    command = [str(program.resolve()), "-f", "-p", str(data.resolve()), "gen1:1-rev22:21"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chapter = ""
    verses: list[str] = []
    for line in printed.splitlines():
        found = re.match(r"([0-9]?[A-Za-z]+\d+):(\d+) (.*)", line)
        if not found:
            continue
        if found[1] != chapter and verses:
            yield "\n".join(verses) + "\n"
            verses = []
        chapter = found[1]
        verses.append(f"{found[2]} {found[3]}")
    yield "\n".join(verses) + "\n"


def _jargon(roots: dict[str, Path]) -> Iterator[str]:
    path = roots["dict-jargon"] / "usr/share/dictd/jargon.dict.dz"
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    # Entries start in column 0; a handful makes one document.
    entries = re.split(r"\n(?=\S)", re.sub(r"[ \t]+\n", "\n", text))
    for first in range(0, len(entries), 6):
        yield "\n".join(entries[first : first + 6]) + "\n"


def _files(root: Path, pattern: str) -> Iterator[str]:
    for path in sorted(root.rglob(pattern)):
        if path.is_file() and not path.is_symlink():
            yield path.read_text("utf-8", "replace")


def _python_manual(roots: dict[str, Path]) -> Iterator[str]:
    for text in _files(roots["python3.11-doc"], "*.rst.txt"):
        yield from _pieces(text)


def _python_code(roots: dict[str, Path]) -> Iterator[str]:
    for text in _files(roots["libpython3.11-stdlib"], "*.py"):
        yield from _pieces(text)


def _html(package: str, *folders: str) -> Callable[[dict[str, Path]], Iterator[str]]:
    def read(roots: dict[str, Path]) -> Iterator[str]:
        for folder in folders or ("",):
            for root in sorted(roots[package].rglob(folder)) if folder else [roots[package]]:
                for page in _files(root, "*.html"):
                    yield from _pieces(_page_text(page))

    return read


def _pieces(text: str, size: int = 12_000) -> Iterator[str]:
    """A long file in parts, cut at empty lines: one huge change log is not one document."""
    while len(text) > 2 * size:
        cut = text.find("\n\n", size)
        if cut < 0:
            break
        yield text[:cut] + "\n"
        text = text[cut + 2 :]
    yield text


_SQLITE_MENU = "Search Documentation Search Changelog"  # every page opens with the site's menu


class _Text(HTMLParser):
    BLOCKS = frozenset(
        [
            "p",
            "div",
            "li",
            "dt",
            "dd",
            "tr",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "pre",
            "br",
            "table",
            "ul",
            "ol",
            "dl",
            "section",
        ]
    )
    SKIPPED = frozenset(["script", "style", "nav", "head", "button", "title"])

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skip = self.pre = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.skip += tag in self.SKIPPED
        self.pre += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n\n" if tag in ("p", "pre", "h1", "h2", "h3") else "\n")

    def handle_endtag(self, tag: str) -> None:
        self.skip -= tag in self.SKIPPED
        self.pre -= tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.skip <= 0:
            self.parts.append(data if self.pre > 0 else re.sub(r"\s+", " ", data))


def _page_text(page: str) -> str:
    main = re.search(r"<main>.*?</main>", page, re.S)
    parser = _Text()
    parser.feed(main[0] if main else page)
    text = re.sub(r"[ \t]*\n[ \t]*\n\s*\n*", "\n\n", "".join(parser.parts))
    if not main:  # listings of pages without <main> carry the indentation of their markup
        text = re.sub(r"\n +(?=\S)", "\n", text)
    return text.split(_SQLITE_MENU)[-1].strip() + "\n"


_READ = {
    "scripture": _scripture,
    "jargon": _jargon,
    "python-manual": _python_manual,
    "python-code": _python_code,
    "postgres-manual": _html("postgresql-doc-15"),
    "sqlite-manual": _html("sqlite3-doc"),
    "rust-manual": _html(
        "rust-doc", "book", "reference", "rust-by-example", "nomicon", "edition-guide"
    ),
}
