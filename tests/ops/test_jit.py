"""The loader: what a broken source says, what is reused, and processes that start at once."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest

from sere_sglang.ops import BuildError, jit

SOURCE = """
#include <tvm/ffi/function.h>
int add(int a, int b) { return a + b + OFFSET; }
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add, add);
"""


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a csrc folder of the test's own."""
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "add.cpp").write_text(SOURCE.replace("OFFSET", "0"))
    monkeypatch.setenv("SERE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "csrc_dir", lambda: csrc)
    jit._load_module.cache_clear()
    return tmp_path


def built(workshop: Path) -> list[Path]:
    return sorted((workshop / "cache").glob("*.so"))


def test_a_module_is_compiled_once(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jit.load_module("add", ["add.cpp"]).add(2, 3) == 5
    assert len(built(workshop)) == 1
    jit._load_module.cache_clear()
    monkeypatch.setattr(jit, "_compile", lambda *_: pytest.fail("compiled again"))
    assert jit.load_module("add", ["add.cpp"]).add(2, 3) == 5


@pytest.mark.parametrize(
    "change", ["source", "header", "its own header", "flags", "compiler", "cpu"]
)
def test_what_a_library_depends_on_is_in_its_key(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = workshop / "csrc" / "add.cpp"
    if change == "its own header":  # a test's source, which lies elsewhere
        (workshop / "native").mkdir()
        source = source.rename(workshop / "native" / "add.cpp")
    flags = ["-O3", jit.TUNE_FLAG]
    before = jit._cache_key([source], "c++", flags)
    if change == "source":
        source.write_text(SOURCE.replace("OFFSET", "1"))
    elif change == "header":
        (workshop / "csrc" / "add.h").write_text("// new\n")
    elif change == "its own header":
        (workshop / "native" / "add.h").write_text("// new\n")
    elif change == "flags":
        flags = ["-O2", jit.TUNE_FLAG]
    elif change == "compiler":
        monkeypatch.setattr(jit, "_compiler_version", lambda _: "another")
    else:
        monkeypatch.setattr(jit, "_cpu_features", lambda: "another")
    assert jit._cache_key([source], "c++", flags) != before


def test_a_second_checkout_compiles_nothing_again(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, sources, flags = "add", ["add.cpp"], list(jit.CXX_FLAGS)
    library = jit.build_library(name, sources, jit.find_cxx(), flags)
    shutil.copytree(workshop / "csrc", tmp_path / "elsewhere")
    monkeypatch.setattr(jit, "csrc_dir", lambda: tmp_path / "elsewhere")
    monkeypatch.setattr(jit, "_compile", None)
    assert jit.build_library(name, sources, jit.find_cxx(), flags) == library


def test_a_library_for_the_gpu_does_not_depend_on_the_cpu(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled ahead of time into an image, it serves on another machine."""
    source, flags = workshop / "csrc" / "add.cpp", jit._cuda_flags("sm_90a")
    before = jit._cache_key([source], "c++", flags)
    monkeypatch.setattr(jit, "_cpu_features", lambda: "another")
    assert jit._cache_key([source], "c++", flags) == before


def test_a_compile_error_names_the_line_and_the_command(workshop: Path) -> None:
    (workshop / "csrc" / "add.cpp").write_text("int add( { return nothing; }\n")
    with pytest.raises(BuildError) as raised:
        jit.load_module("add", ["add.cpp"])
    message = str(raised.value)
    assert "add.cpp:1" in message and "error" in message and "command: " in message
    log = Path(message.rsplit("full output: ", 1)[1])
    assert "return nothing" in log.read_text()
    assert built(workshop) == []


def test_missing_source_and_missing_compiler(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BuildError, match=r"source not found: .*gone\.cpp"):
        jit.load_module("gone", ["gone.cpp"])
    monkeypatch.setenv("PATH", str(workshop))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match="no C\\+\\+ compiler found"):
        jit.load_module("add", ["add.cpp"])


def test_unusable_cache_folder_is_a_build_error(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workshop / "file").write_text("")
    monkeypatch.setenv("SERE_CACHE_DIR", str(workshop / "file" / "cache"))
    with pytest.raises(BuildError, match="SERE_CACHE_DIR"):
        jit.load_module("add", ["add.cpp"])


def _load_in_child(csrc: Path, results: multiprocessing.Queue[int]) -> None:
    jit.csrc_dir = lambda: csrc  # type: ignore[assignment]
    jit._load_module.cache_clear()
    results.put(jit.load_module("add", ["add.cpp"]).add(20, 22))


def test_processes_that_start_together_build_one_library(workshop: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    children = [
        context.Process(target=_load_in_child, args=(workshop / "csrc", results)) for _ in range(3)
    ]
    for child in children:
        child.start()
    assert [results.get(timeout=600) for _ in children] == [42] * 3
    for child in children:
        child.join(timeout=600)
        assert child.exitcode == 0
    assert len(built(workshop)) == 1
    assert list((workshop / "cache").glob("*.tmp")) == []
