"""The text that ``bench`` and ``evaluate`` decode: a file's, or the built-in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sere_sglang.calibration.text import read_windows
from sere_sglang.errors import SereError
from sere_sglang.measure.texts import CONTINUATION_TOKENS, PROMPT_TOKENS, Text, cut_texts

_LENGTH = PROMPT_TOKENS + CONTINUATION_TOKENS


def texts_of(file: Path | None, column: str, tokenizer: Any, count: int) -> tuple[str, list[Text]]:
    """Its name, and up to `count` pieces of one length. Raises `SereError`."""
    try:
        text = read_windows(
            [] if file is None else [file],
            lambda document: tokenizer.encode(document, add_special_tokens=False),
            num_tokens=count * _LENGTH,
            length=_LENGTH,
            column=column,
            seed=1,
        )
    except SereError as error:  # worded for the flag of calibrate
        told = str(error).replace("--data ", "--text ").replace(" or a smaller --length", "")
        raise SereError(told) from None
    texts = cut_texts(text.windows, tokenizer)
    if not texts:
        raise SereError(f"--text {text.name}: no document has {_LENGTH} tokens; give longer text")
    return text.name, texts
