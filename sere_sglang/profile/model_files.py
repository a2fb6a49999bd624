"""A model's files on this machine: its folder, or what the hub cache holds of a hub id."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path

from sere_sglang.errors import PATH_SHOWN, SereError, cut

DEFAULT_FILE_NAME = "sere_profile.safetensors"

# Large files are sampled: a server starts with it, and checkpoints have hundreds of gigabytes.
_WHOLE_BYTES = 16 << 20
_BLOCKS, _BLOCK_BYTES = 64, 4096


def model_folder(model: str, revision: str | None = None) -> Path | None:
    """A model folder itself; of a hub id the snapshot in the cache, None before it is there."""
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def model_file(model: str, name: str, revision: str | None = None) -> Path | None:
    """A file of the model folder, or of the hub repository (downloaded); None if it has none."""
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (OSError, ValueError):  # no such file, no network, no hub id
        return None


def downloaded(model: str, revision: str | None = None) -> Path:
    """The folder of `model` itself; a hub id is downloaded as far as it is not here.

    Raises `SereError` for what is neither.
    """
    here = model_folder(model, revision)
    if here is not None and (here == Path(model) or weights_fingerprint(here)):
        return here
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # no hub id, no such model, no network
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise SereError(
            f"--model {cut(model, PATH_SHOWN)} is neither a folder nor a model that the hub gives: "
            f"{cut(said[0], PATH_SHOWN)}"
        ) from None


def weights_fingerprint(folder: Path | None) -> str:
    """A hash of a checkpoint's safetensors files: names, sizes, headers, contents.

    Of files above 16 MiB only evenly spaced blocks are read, so a change of a few values can
    go unseen there. Empty, that is unknown, when not all of them are here.
    """
    files = _weight_files(folder) if folder is not None else []
    stats = ((file, file.stat()) for file in files)
    return _fingerprint(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))


@functools.lru_cache(maxsize=8)  # a command asks several times, and some checkpoints have 160 files
def _fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str:
    """files: with sizes and times of change, so that a file that is written again is read again."""
    digest = hashlib.sha256()
    for file, size, _changed in files:
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            if size <= _WHOLE_BYTES:
                digest.update(content.read())
                continue
            header = int.from_bytes(content.read(8), "little")
            digest.update(content.read(min(header, size)))
            for block in range(_BLOCKS):
                content.seek(8 + header + (size - 8 - header) * block // _BLOCKS)
                digest.update(content.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16] if files else ""


def _weight_files(folder: Path) -> list[Path]:
    """Those of the index, where there is one; none while a download is incomplete."""
    indexed = indexed_files(folder)
    if indexed:
        files = [folder / name for name in sorted(set(indexed.values()))]
        return files if all(p.is_file() for p in files) else []
    files = [p for p in sorted(folder.glob("*.safetensors")) if p.name != DEFAULT_FILE_NAME]
    return [] if any("-of-" in p.name for p in files) else files


def indexed_files(folder: Path) -> dict[str, str]:
    """tensor name -> file, of a checkpoint that has an index. Raises `SereError`."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    try:
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise SereError(f"{index}: not the index of a checkpoint ({error!r})") from None
    return files
