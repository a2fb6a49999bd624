"""Seam: ``model_loader.loader.DefaultModelLoader._prepare_weights``.

A checkpoint of one file has no index, so SGLang takes every ``*.safetensors`` of its folder
for weights. A profile lies there too; models that refuse unknown names (OLMoE) would not load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.patches.seam import declare
from sere_sglang.profile.model_files import DEFAULT_FILE_NAME

_TARGET = "sglang.srt.model_loader.loader.DefaultModelLoader._prepare_weights"


def register() -> None:
    """With or without ``--moe-backend sere``: the profile lies there in both cases."""
    declare(_TARGET, _without_profile, HookType.AFTER)


def _without_profile(
    result: tuple[str, list[str], bool], *_args: Any, **_kw: Any
) -> tuple[str, list[str], bool]:
    folder, files, use_safetensors = result
    return folder, [f for f in files if Path(f).name != DEFAULT_FILE_NAME], use_safetensors
