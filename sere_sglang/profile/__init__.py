"""What a server loads: the profile file, the model it belongs to. Nothing here imports SGLang."""

from __future__ import annotations

from sere_sglang.profile.file import (
    FORMAT_VERSION,
    RULES_VERSION,
    SURROGATES_VERSION,
    ProfileError,
    ProfileMetadata,
    SereProfile,
    load_profile,
    save_profile,
)
from sere_sglang.profile.model_files import DEFAULT_FILE_NAME
from sere_sglang.profile.model_info import (
    LOADED_LAYERS,
    MoeModelInfo,
    check_has_scale,
    check_profile_fits,
    surrogates_command,
)
from sere_sglang.profile.place import AUTO, default_place, find_profile

__all__ = [
    "AUTO",
    "DEFAULT_FILE_NAME",
    "FORMAT_VERSION",
    "LOADED_LAYERS",
    "RULES_VERSION",
    "SURROGATES_VERSION",
    "MoeModelInfo",
    "ProfileError",
    "ProfileMetadata",
    "SereProfile",
    "check_has_scale",
    "check_profile_fits",
    "default_place",
    "find_profile",
    "load_profile",
    "save_profile",
    "surrogates_command",
]
