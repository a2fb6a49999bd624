"""Calibration text: files in, token windows out; the same files and seed give the same windows."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from sere_sglang.errors import PATH_SHOWN, SereError, cut

FORMATS = (".txt", ".md", ".jsonl", ".json", ".parquet")
BUILT_IN = "built-in"

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape one alone, no tokenizer takes it
_POOL = 8  # read at most this many times the text that is used, however large the files are


@dataclass(frozen=True)
class CalibrationText:
    """windows: token ids, each of at most the asked length. digest: of the windows."""

    name: str
    windows: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.windows))

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.windows).encode()).hexdigest()[:16]


def read_windows(
    files: Sequence[Path],
    tokenize: Callable[[str], list[int]],
    *,
    num_tokens: int,
    length: int,
    column: str = "text",
    seed: int = 0,
) -> CalibrationText:
    """Choose about `num_tokens` tokens in windows of `length` out of `files`.

    Every document is cut into windows; a last one shorter than a quarter of `length` is left
    out. Without files the text that ships with the package is used. Raises `SereError`.
    """
    windows: list[list[int]] = []
    found = 0
    shortest = max(1, length // 4)
    for document in _documents(files, column) if files else [_built_in_text()]:
        ids = tokenize(document)
        for start in range(0, len(ids), length):
            window = ids[start : start + length]
            if len(window) >= shortest:
                windows.append(window)
                found += len(window)
        if found >= _POOL * num_tokens:
            break
    name = ", ".join(str(f) for f in files) if files else BUILT_IN
    if not windows:
        raise SereError(
            f"--data {name}: no usable text, no document has {shortest} tokens; give longer "
            "text or a smaller --length"
        )
    random.Random(seed).shuffle(windows)
    chosen, taken = [], 0
    for window in windows:
        if taken >= num_tokens:
            break
        window = window[: num_tokens - taken]
        chosen.append(window)
        taken += len(window)
    return CalibrationText(name, chosen)


def check_files(files: Iterable[Path]) -> None:
    """Raise `SereError` for what is no file, may not be read or is of an unknown format."""
    for file in files:
        if os.path.isdir(file):
            raise SereError(f"--data {file}: a folder; name one file")
        if not os.path.isfile(file):  # not Path.is_file, which raises for a name too long
            raise SereError(f"--data {cut(str(file), PATH_SHOWN)}: no such file")
        if not os.access(file, os.R_OK):
            raise SereError(f"--data {file}: it may not be read; change that, or name another file")
        if file.suffix.lower() not in FORMATS:
            raise SereError(
                f"--data {file}: cannot read {file.suffix or 'a file without suffix'}; "
                f"give {', '.join(FORMATS)}"
            )


def _documents(files: Sequence[Path], column: str) -> Iterator[str]:
    check_files(files)
    for file in files:
        suffix = file.suffix.lower()
        try:
            if suffix == ".parquet":
                yield from _parquet(file, column)
            elif suffix in (".jsonl", ".json"):
                yield from _json_lines(file, column)
            else:
                yield file.read_text()
        except UnicodeDecodeError as error:
            raise SereError(f"--data {file}: not UTF-8 text ({error})") from None


def _json_lines(file: Path, column: str) -> Iterator[str]:
    with file.open() as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", "too deep, or too long a number")
                raise SereError(
                    f"--data {file}: line {number} is no JSON ({reason}); one object a line"
                ) from None
            text = record.get(column) if isinstance(record, dict) else record
            if not isinstance(text, str):
                held = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise SereError(
                    f"--data {file}: line {number} has no text in {column!r} (it holds: "
                    f"{cut(held, 200)}); name the right one with --column"
                )
            if _SURROGATE.search(text):
                raise SereError(
                    f"--data {file}: line {number} holds half a character, as \\ud800 without its "
                    "second half; leave the line out"
                )
            yield text


def _parquet(file: Path, column: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SereError(
            f"--data {file}: reading parquet needs pyarrow: pip install pyarrow"
        ) from None
    try:
        table = ParquetFile(file)
    except ArrowInvalid as error:
        raise SereError(f"--data {file}: not a parquet file ({error})") from None
    if column not in table.schema_arrow.names:
        raise SereError(
            f"--data {file}: no column {column!r} (it holds: "
            f"{', '.join(table.schema_arrow.names)}); name the right one with --column"
        )
    for batch in table.iter_batches(batch_size=256, columns=[column]):
        yield from (text for text in batch.column(0).to_pylist() if isinstance(text, str))


def _built_in_text() -> str:
    return (resources.files("sere_sglang.calibration") / "calibration.txt").read_text("utf-8")
