"""Calibration text: every format, the same choice for the same seed, errors that name the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sere_sglang.calibration.text import read_windows
from sere_sglang.errors import SereError


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def windows(*files: Path, num_tokens: int = 100, length: int = 20, **extra: Any) -> list[str]:
    text = read_windows(files, tokenize, num_tokens=num_tokens, length=length, **extra)
    return [bytes(window).decode() for window in text.windows]


DOCUMENTS = ["the first document, long enough", "tiny", "the second document of the file"]


def test_all_formats_give_the_same_windows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"id": 1, "body": d}) + "\n" for d in DOCUMENTS))
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": DOCUMENTS}), table)
    from_lines = windows(lines, column="body")
    assert from_lines == windows(table, column="body")
    texts = [tmp_path / f"{i}.txt" for i in range(3)]
    for path, document in zip(texts, DOCUMENTS, strict=True):
        path.write_text(document)
    assert from_lines == windows(*texts)
    assert "the first document, " in from_lines and "long enough" in from_lines
    assert not any("tiny" in window for window in from_lines)


def test_seed_chooses_and_tokens_bound(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i:04d} of the text\n" for i in range(300)))
    chosen = windows(path, num_tokens=130)
    assert chosen == windows(path, num_tokens=130)
    assert sum(map(len, chosen)) == 130
    assert chosen != windows(path, num_tokens=130, seed=1)
    digests = {
        read_windows([path], tokenize, num_tokens=130, length=20, seed=s).digest for s in (0, 0, 1)
    }
    assert len(digests) == 2


def test_built_in_text_is_enough_for_the_default() -> None:
    text = read_windows([], tokenize, num_tokens=16384, length=512)
    assert text.name == "built-in" and text.num_tokens == 16384
    # Common tokenizers have some four bytes a token.
    everything = read_windows([], tokenize, num_tokens=10**9, length=512)
    assert everything.num_tokens > 5 * 16384


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "no such file"),
        ("a.txt", b"short", "no usable text"),
        ("a.txt", b"\xff\xfe\x00\x80 not text" * 20, "not UTF-8"),
        ("a.csv", b"x", "cannot read .csv"),
        ("a.jsonl", b"{broken", "line 1 is no JSON"),
        ("a.jsonl", b'"a line"\n' + b"[" * 100_000, "line 2 is no JSON .*too deep"),
        ("a.jsonl", b"9" * 5000, "line 1 is no JSON .*too long a number"),
        ("a.jsonl", b'{"text": "x\\ud800"}\n', r"line 1 holds half a character, as \\ud800"),
        ("a.jsonl", b'{"other": "x"}\n', "it holds: other.*--column"),
        ("a.parquet", b"PAR1 no", "not a parquet file"),
    ],
)
def test_errors_name_file_and_fix(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SereError, match=message) as error:
        windows(path, length=40)
    assert str(path) in str(error.value) and "--data" in str(error.value)


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": DOCUMENTS}), path)
    with pytest.raises(SereError, match=r"no column 'text' \(it holds: body\); .*--column"):
        windows(path)
