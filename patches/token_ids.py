"""Seam: ``TokenizerManager._create_tokenized_object``.

A request that gives ``input_ids`` outside the model's vocabulary ends SGLang's scheduler, which
looks them up in the embedding, and with it the server; so does one of no token at all. They are
answered with status 400 instead.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.errors import shown
from sere_sglang.patches.request_quality import Refusal
from sere_sglang.patches.seam import hook

_TARGET = "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object"


def install() -> None:
    """In the launcher, once its server is known to run SERE."""
    needs = ["obj", "input_text", "input_ids", "input_embeds"]
    hook(_TARGET, _check, HookType.BEFORE, needs=needs, runs="always", deliberate=(Refusal,))


def _check(
    manager: Any,
    obj: Any,
    _input_text: str,
    input_ids: list[int] | None,
    input_embeds: Any = None,
    *_args: Any,
    **_kwargs: Any,
) -> None:
    # A turn of a session has the ones before it.
    continues = getattr(obj, "session_params", None)
    if input_ids is not None and not len(input_ids) and not input_embeds and not continues:
        raise Refusal("the prompt has no token: give some text, or input_ids that are not empty")
    ids = getattr(obj, "input_ids", None)
    if not ids or obj.contains_mm_input():  # whose places are no words
        return
    size = manager.model_config.vocab_size
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= size:
        wrong = next(i for i in ids if type(i) is not int or not 0 <= i < size)
        raise Refusal(f"input_ids must be whole numbers from 0 to {size - 1}, got {shown(wrong)}")
