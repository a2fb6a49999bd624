"""What a user installs: everything is inside, and it works away from the checkout."""

from __future__ import annotations

import configparser
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from sere_sglang.ops.cuda import library, prebuilt
from tests.packaging.dist import ROOT, build

DATA = ("py.typed", "calibration/calibration.txt")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("published"))


def _shipped() -> set[str]:
    """Paths below the package that an installation has to have."""
    folders = {"": ROOT / "sere_sglang", "patches/": ROOT / "patches", "csrc/": ROOT / "csrc"}
    found = {
        prefix + str(file.relative_to(folder))
        for prefix, folder in folders.items()
        for file in folder.rglob("*.*")
        if file.suffix in {".py", ".cpp", ".cu", ".cuh", ".h"}
    }
    return found | set(DATA)


def test_wheel_and_sdist_hold_every_source(built: Path) -> None:
    shipped = _shipped()
    assert {"patches/seam.py", "csrc/reroute.cu", "csrc/cpu_moe.cpp", "ops/reroute.py"} < shipped
    (wheel,) = built.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl"), "no kernels compiled ahead"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"sere_sglang/{name}" for name in shipped} - names == set()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sere_sglang"}
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive_:
        packed = {name.split("/", 1)[-1] for name in archive_.getnames()}
    assert {f"sere_sglang/{name}" for name in shipped} - packed == set()


def test_the_unpacked_wheel_works_outside_the_checkout(built: Path, tmp_path: Path) -> None:
    """Its own copy is imported: the environment's editable install stands behind it."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    entry_points = configparser.ConfigParser()
    entry_points.read_string(next(tmp_path.glob("*.dist-info/entry_points.txt")).read_text())
    targets = [target for group in entry_points.values() for target in group.values()]
    assert len(targets) == 4
    script = f"""
import importlib, sys
import sere_sglang
assert sere_sglang.__file__.startswith({str(tmp_path)!r}), sere_sglang.__file__
assert "torch" not in sys.modules and "sglang" not in sys.modules
from sere_sglang import reroute
from sere_sglang.ops.jit import csrc_dir
assert str(csrc_dir()).startswith({str(tmp_path)!r}) and (csrc_dir() / "reroute.cu").is_file()
for target in {targets!r}:
    module, name = target.split(":")
    assert callable(getattr(importlib.import_module(module), name)), target
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_wheel_can_bring_its_kernels(tmp_path: Path) -> None:
    """A script stands for nvcc, whose work takes minutes: ``launch/compile_check.sh`` has it."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\n')
    nvcc.chmod(0o755)
    dist = build(tmp_path, SERE_AOT="1", CUDA_HOME=str(tmp_path / "cuda"))
    (wheel,) = dist.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        made = {
            Path(name).name: archive.read(name).decode()
            for name in archive.namelist()
            if name.startswith("sere_sglang/csrc/prebuilt/")
        }
    assert set(made) == {f"{n}-{a}.so" for n in library.LIBRARIES for a in prebuilt.ARCHS}
    assert "-arch=sm_90a" in made["fused-sm_90a.so"]
    assert "reroute_fused.cu" in made["fused-sm_90a.so"]
