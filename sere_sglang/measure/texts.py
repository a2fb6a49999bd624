"""Text cut to one length, so that a batch of it decodes in lockstep."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

PROMPT_TOKENS, CONTINUATION_TOKENS = 48, 33


@dataclass(frozen=True)
class Text:
    """prompt: what `prompt_ids` say; continuation_ids: how it goes on in the text."""

    prompt: str
    prompt_ids: list[int]
    continuation_ids: list[int]

    def cut(self, steps: int) -> Text:
        """With a continuation of at most so many tokens."""
        return replace(self, continuation_ids=self.continuation_ids[:steps])


def cut_texts(
    windows: Iterable[list[int]],
    tokenizer: Any,
    prompt_tokens: int = PROMPT_TOKENS,
    continuation_tokens: int = CONTINUATION_TOKENS,
) -> list[Text]:
    """A `Text` of the start of each window of token ids; those too short are left out."""
    length = prompt_tokens + continuation_tokens
    return [
        Text(
            tokenizer.decode(window[:prompt_tokens]),
            list(window[:prompt_tokens]),
            list(window[prompt_tokens:length]),
        )
        for window in windows
        if len(window) >= length
    ]


def as_many(texts: list[Text], count: int) -> list[Text]:
    """`count` of them, from the first again where there are fewer."""
    return list(itertools.islice(itertools.cycle(texts), count))
