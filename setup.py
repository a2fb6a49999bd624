"""What pyproject.toml cannot say: wheels that hold compiled CUDA kernels.

    SERE_AOT=1 python -m build --wheel --no-isolation

needs nvcc, and an environment in which sere-sglang runs. Without SERE_AOT the wheel is pure Python
and its kernels are compiled where they are used.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

AHEAD = os.environ.get("SERE_AOT") == "1"


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if AHEAD and not self.editable_mode:
            sys.path.insert(0, str(Path(__file__).parent))
            from sere_sglang.ops.cuda.library import compile_into
            from sere_sglang.ops.cuda.prebuilt import folder_of

            compile_into(folder_of(Path(self.build_lib, "sere_sglang", "csrc")))


class WithKernels(Distribution):
    """Makes the wheel one of this platform."""

    def has_ext_modules(self) -> bool:
        return AHEAD


class AnyPython(bdist_wheel):
    """The kernels know no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if AHEAD else (python, abi, platform)


setup(distclass=WithKernels, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPython})
