"""Kernels that a wheel brought along: which GPU takes which, and that no compiler is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sere_sglang.ops import jit
from sere_sglang.ops.cuda import library, prebuilt
from sere_sglang.ops.jit import BuildError

SOURCE = """
#include <tvm/ffi/function.h>
int reroute(int a) { return a + 1; }
TVM_FFI_DLL_EXPORT_TYPED_FUNC(reroute, reroute);
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of libraries of an installation on a machine with a Hopper GPU and no nvcc."""

    def no_nvcc() -> str:
        raise BuildError("no nvcc found")

    monkeypatch.setenv("SERE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "csrc_dir", lambda: tmp_path)
    monkeypatch.setattr(prebuilt, "csrc_dir", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(jit, "find_nvcc", no_nvcc)
    monkeypatch.setattr(library, "find_nvcc", no_nvcc)
    jit._load_module.cache_clear()
    library.load_function.cache_clear()
    folder = prebuilt.folder_of(tmp_path)
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), None),
        ((12, 0), None),
        ((7, 5), None),
    ],
)
def test_which_gpu_takes_which(capability: tuple[int, int], arch: str | None) -> None:
    assert prebuilt.arch_for(capability) == arch
    assert arch is None or arch in prebuilt.ARCHS


def test_what_is_there_is_loaded_without_nvcc(installed: Path) -> None:
    """A library of the C++ compiler's stands for one of nvcc's."""
    (installed.parent / "reroute.cpp").write_text(SOURCE)
    made = jit.build_library("reroute", ["reroute.cpp"], jit.find_cxx(), jit.CXX_FLAGS)
    made.rename(prebuilt.library_in(installed, "reroute", "sm_90a"))
    function = library.load_function("reroute")
    library.load_function.cache_clear()
    assert function(41) == 42


def test_without_one_nvcc_is_asked_for(installed: Path) -> None:
    with pytest.raises(BuildError, match="no nvcc found"):
        library.load_function("reroute")


def test_one_that_does_not_load_is_compiled_anew(
    installed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prebuilt.library_in(installed, "reroute", "sm_90a").write_text("no library")
    with pytest.raises(BuildError, match="no nvcc found"):
        library.load_function("reroute")
    assert "does not load" in caplog.text


def test_a_wheels_gpu_is_served_without_nvcc(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert library.is_available("cuda") == "no nvcc found"
    for name in library.LIBRARIES:
        prebuilt.library_in(installed, name, "sm_90a").touch()
    assert library.is_available("cuda") is None
