"""Where a model's profile lies: beside its weights, or in a cache of this user's.

A hub snapshot belongs to the hub's cache, and a model folder may be read-only: what is calibrated
for those goes into that cache, under the fingerprints of config and weights, so that a finetune
never finds its base model's.
"""

from __future__ import annotations

import os
from pathlib import Path

from sere_sglang.cache import cache_folder
from sere_sglang.errors import PATH_SHOWN, ProfileError, cut
from sere_sglang.profile.model_files import DEFAULT_FILE_NAME, model_file
from sere_sglang.profile.model_info import MoeModelInfo

AUTO = "auto"
"""``--sere-profile auto``: calibrate first where there is none."""


def find_profile(model: MoeModelInfo, given: str | None = None) -> Path:
    """The profile a server loads: the flag's, else one beside the weights, in the model's folder
    or hub repository, else the cache's. Raises `ProfileError` with the command that writes it.
    """
    if given is not None:
        path = Path(given)
        if not _exists(path):
            raise ProfileError(
                f"--sere-profile {cut(given, PATH_SHOWN)}: no such file; write one with "
                f"'sere-sglang calibrate --model {model.name} --out {cut(given, PATH_SHOWN)}'"
            )
        return path
    found = model_file(model.name, DEFAULT_FILE_NAME, model.revision)
    if found is not None:
        return found
    cached = _cached(model)
    if cached is not None and cached.is_file():
        return cached
    revision = f" -- --revision {model.revision}" if model.revision else ""
    raise ProfileError(
        "--moe-backend sere needs a similarity profile, and there is none of "
        f"{model.name}; write it with 'sere-sglang calibrate --model {model.name}{revision}', or "
        f"let the server write it first with --sere-profile {AUTO}"
    )


def default_place(model: MoeModelInfo) -> Path:
    """Where calibration writes, and a server looks, when nobody says where.

    Raises `ProfileError` for a model that is not whole on this machine.
    """
    folder = Path(model.name)
    if folder.is_dir() and os.access(folder, os.W_OK) and not _of_hub(folder):
        return folder / DEFAULT_FILE_NAME
    cached = _cached(model)
    if cached is None:
        raise ProfileError(
            f"--model {model.name}: its safetensors files are not all here, which name its profile "
            "in the cache; say with --out where to write"
        )
    return cached


def _cached(model: MoeModelInfo) -> Path | None:
    """None while the weights are unknown."""
    if not model.weights:
        return None
    return cache_folder() / "profiles" / f"{model.fingerprint}-{model.weights}.safetensors"


def _of_hub(folder: Path) -> bool:
    """A snapshot that somebody named by its path."""
    return folder.resolve().parent.name == "snapshots"


def _exists(path: Path) -> bool:
    """Whatever it is; the reader says what is wrong with it."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False
