"""The text that ``bench`` and ``evaluate`` decode: a file's, or the built-in one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sere_sglang.calibration.text import check_files, read_windows
from sere_sglang.errors import SereError
from sere_sglang.measure.texts import CONTINUATION_TOKENS, PROMPT_TOKENS, Text, cut_texts

_LENGTH = PROMPT_TOKENS + CONTINUATION_TOKENS


def check_text(file: Path | None) -> None:
    """Raise `SereError` for a ``--text`` that is no readable file, before a server starts."""
    with _named_as_text():
        check_files([] if file is None else [file])


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
