"""Seam: ``TokenizerManager._create_tokenized_object``.

Every API (native, OpenAI-compatible, ``Engine``) turns a request into what the scheduler gets
there, and answers a ValueError with status 400. A request that asks for a quality this server
does not offer is told so instead of being served with another one.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.errors import SereError
from sere_sglang.patches.seam import hook
from sere_sglang.schedule.request_quality import QualityRules

_TARGET = "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object"
_rules: QualityRules | None = None


class Refusal(ValueError):
    """A request that may not have what it asks for; SGLang answers it with status 400."""


def install(rules: QualityRules) -> None:
    """In the launcher, once its server is known to run SERE."""
    global _rules
    if _rules is None:
        hook(
            _TARGET,
            _check,
            HookType.BEFORE,
            needs=["obj"],
            runs="always",
            deliberate=(Refusal,),
        )
    _rules = rules


def _check(manager: Any, obj: Any, *_args: Any, **_kwargs: Any) -> None:
    sampling = getattr(obj, "sampling_params", None)
    if _rules is None or not isinstance(sampling, dict):
        return
    # --preferred-sampling-params: SGLang takes them for what a request does not say.
    preferred = getattr(manager, "preferred_sampling_params", None) or {}
    try:
        _rules.check({**preferred, **sampling}.get("custom_params"))
    except SereError as error:
        raise Refusal(str(error)) from None
