"""Hidden states of the whole text, in two memory-mapped files.

A layer reads one and writes the other, so what is redone after an interruption is unharmed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from sere_sglang.errors import SereError


class HiddenStates:
    """[T, H] before and behind the running layer.

    Their pages are the operating system's to write out and drop; they take no memory of ours.
    Their content has no checksum, unlike the partial file: they change with every window, and may
    be larger than memory. What is kept is looked at for its size only.
    """

    def __init__(
        self, files: tuple[Path, Path], shape: tuple[int, int], dtype: torch.dtype, *, keep: bool
    ) -> None:
        """keep: the files must be there. Raises `SereError`."""
        size = shape[0] * shape[1] * dtype.itemsize
        self._states = []
        for file in files:
            if keep and (not file.is_file() or file.stat().st_size != size):
                raise SereError(
                    f"--resume: {file} is missing or of another size; delete what is left of "
                    "that calibration and start without --resume"
                )
            if not keep:
                _reserve(file, size)
            flat = torch.from_file(str(file), shared=True, size=shape[0] * shape[1], dtype=dtype)
            self._states.append(flat.view(shape))

    def into(self, layer: int) -> torch.Tensor:
        """What layer `layer` is given; ``into(layer + 1)`` is what it gives."""
        return self._states[layer % 2]


def _reserve(file: Path, size: int) -> None:
    """Take the space now: a full disk under a mapped file would kill the process."""
    try:
        with file.open("wb") as out:
            os.posix_fallocate(out.fileno(), 0, size)
    except OSError as error:
        with contextlib.suppress(OSError):
            file.unlink()
        raise SereError(
            f"{file}: cannot reserve {size >> 20} MiB for the hidden states ({error}); free some "
            "space, give --out elsewhere, or lower --tokens"
        ) from None
