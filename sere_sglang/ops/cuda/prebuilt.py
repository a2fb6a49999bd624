"""CUDA libraries that a wheel brought along, for servers without nvcc (``SERE_AOT=1``, setup.py).

They are linked against tvm-ffi's C interface and no torch, and hold their CUDA runtime.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sere_sglang.ops.jit import csrc_dir

logger = logging.getLogger(__name__)

ARCHS = ("sm_80", "sm_90a", "sm_100")
"""What a wheel holds."""


def library_in(folder: Path, name: str, arch: str) -> Path:
    """Where `name` for `arch` lies in a folder of such libraries."""
    return folder / f"{name}-{arch}.so"


def folder_of(csrc: Path) -> Path:
    """Of an installation whose sources are in `csrc`."""
    return csrc / "prebuilt"


def arch_for(capability: tuple[int, int]) -> str | None:
    """Which of `ARCHS` a GPU runs: the same major version, from the minor one on; sm_90a holds
    what sm_90 alone has. None for others, for which nvcc compiles."""
    if capability == (9, 0):
        return "sm_90a"
    return {8: "sm_80", 10: "sm_100"}.get(capability[0])


def find(name: str) -> Path | None:
    """The library of this name for the current GPU, where the wheel brought one."""
    import torch

    arch = arch_for(torch.cuda.get_device_capability())
    library = library_in(folder_of(csrc_dir()), name, arch) if arch else None
    return library if library is not None and library.is_file() else None


def load(name: str) -> Any | None:
    """The tvm-ffi module of `find`; None where there is none, or none that loads."""
    library = find(name)
    if library is None:
        return None
    import tvm_ffi

    try:
        return tvm_ffi.load_module(str(library))
    except Exception as error:
        logger.warning("%s does not load (%s); compiling it for this machine", library, error)
        return None
