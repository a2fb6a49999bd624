"""The text that ``bench`` and ``evaluate`` decode: a file's, or the built-in one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sere_sglang.calibration.text import check_files, read_windows
from sere_sglang.errors import PATH_SHOWN, SereError, cut
from sere_sglang.measure.texts import CONTINUATION_TOKENS, PROMPT_TOKENS, Text, cut_texts

_LENGTH = PROMPT_TOKENS + CONTINUATION_TOKENS


def check_text(file: Path | None) -> None:
    """Raise `SereError` for a ``--text`` that is no readable file, before a server starts."""
    if file is None:
        return
    if os.path.isdir(file):
        raise SereError(f"--text {file}: a folder; name one file")
    if not os.path.isfile(file):  # not Path.is_file, which raises for a name too long for a file
        raise SereError(f"--text {cut(str(file), PATH_SHOWN)}: no such file")
    if not os.access(file, os.R_OK):
        raise SereError(f"--text {file}: it may not be read; change that, or name another file")
    with _named_as_text():
        check_files([file])


def texts_of(file: Path | None, column: str, tokenizer: Any, count: int) -> tuple[str, list[Text]]:
    """Its name, and up to `count` pieces of one length. Raises `SereError`."""
    with _named_as_text():
        text = read_windows(
            [] if file is None else [file],
            lambda document: tokenizer.encode(document, add_special_tokens=False),
            num_tokens=count * _LENGTH,
            length=_LENGTH,
            column=column,
            seed=1,
        )
    texts = cut_texts(text.windows, tokenizer)
    if not texts:
        raise SereError(f"--text {text.name}: no document has {_LENGTH} tokens; give longer text")
    return text.name, texts


@contextlib.contextmanager
def _named_as_text() -> Iterator[None]:
    """An error that is worded for the flag of calibrate."""
    try:
        yield
    except SereError as error:
        told = str(error).replace("--data ", "--text ").replace(" or a smaller --length", "")
        raise SereError(told) from None
