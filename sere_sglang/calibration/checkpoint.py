"""The safetensors files of a model folder, read a module at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sere_sglang.errors import SereError
from sere_sglang.profile.model_files import DEFAULT_FILE_NAME, indexed_files


class Checkpoint:
    """file_of: tensor name -> file. Raises `SereError` when there is nothing to read."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.file_of = indexed_files(self.folder) or self._listed()
        missing = sorted({f for f in self.file_of.values() if not (self.folder / f).is_file()})
        if missing or not self.file_of:
            lacks = missing[0] if missing else "*.safetensors"
            raise SereError(
                f"--layer-by-layer: {self.folder} holds no {lacks}; download the whole "
                "checkpoint, or drop --layer-by-layer"
            )

    @contextmanager
    def tensors_below(self, path: str, prefix: str) -> Iterator[dict[str, Any]]:
        """name -> slice that reads when it is used, of the module at `path` of the model.

        A checkpoint may have been saved without the `prefix` of its base model.
        """
        starts = (f"{path}.", f"{path.removeprefix(f'{prefix}.')}.")
        names = [name for name in self.file_of if name.startswith(starts)]
        with ExitStack() as stack:
            files = {}
            for file in sorted({self.file_of[name] for name in names}):
                opened = safe_open(str(self.folder / file), framework="pt")
                files[file] = stack.enter_context(opened)
            yield {name: files[self.file_of[name]].get_slice(name) for name in names}

    def _listed(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name == DEFAULT_FILE_NAME:
                continue
            try:
                with safe_open(str(file), framework="pt") as opened:
                    found |= dict.fromkeys(opened.keys(), file.name)
            except (SafetensorError, OSError) as error:
                raise SereError(f"{file}: not a readable safetensors file ({error})") from None
        return found
