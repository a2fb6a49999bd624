"""Compiles a native source at first use and loads it through tvm-ffi.

A built library depends on the compiler, the flags and, where it is tuned for it, on the CPU; it
depends on no torch ABI. All of that is in its cache key, so a cache folder on a shared home serves
different machines at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sere_sglang.cache import cache_folder

logger = logging.getLogger(__name__)

TUNE_FLAG = "-march=native"
CXX_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-Wall", "-Wno-unknown-pragmas")
CUDA_FLAGS = ("-std=c++20", "-O3", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr")
OPENMP_FLAG = "-fopenmp"
_HEADER_SUFFIXES = {".h", ".hpp", ".cuh", ".inl", ".cu"}  # what a source may include
_SHOWN_ERRORS = 5


class BuildError(RuntimeError):
    """A native source did not compile or load; the message has the first errors and the command."""


def load_module(
    name: str,
    sources: Sequence[str],
    *,
    cuda: bool = False,
    tune: Sequence[str] = (TUNE_FLAG,),
    extra_cflags: Sequence[str] = (),
    cuda_arch: str | None = None,
) -> Any:
    """Build (or find) a library of functions exported with ``TVM_FFI_DLL_EXPORT_TYPED_FUNC``.

    Args:
        name: names the library in the cache and in messages.
        sources: file names below ``csrc/``, or whole paths.
        cuda: compile with nvcc, for this machine's GPU unless `cuda_arch` says otherwise.
        tune: the C++ compiler's flags for an instruction set, this machine's unless said.
        extra_cflags: for the C++ compiler; under `cuda` handed through by nvcc.
        cuda_arch: such as ``sm_90a``.

    Returns:
        The tvm-ffi module; its exported functions are attributes.

    Raises:
        BuildError: no compiler, a compile error, or a library that does not load.
    """
    return _load_module(
        name,
        tuple(sources),
        cuda,
        tuple(tune),
        tuple(extra_cflags),
        cuda_arch,
    )


@functools.cache
def _load_module(
    name: str,
    sources: tuple[str, ...],
    cuda: bool,
    tune: tuple[str, ...],
    extra_cflags: tuple[str, ...],
    cuda_arch: str | None,
) -> Any:
    try:
        import tvm_ffi
    except ImportError as error:
        raise BuildError(f"{name}: apache-tvm-ffi is not installed ({error})") from error

    if cuda:
        compiler = find_nvcc()
        flags = _cuda_flags(cuda_arch or detect_cuda_arch())
        flags += [word for flag in extra_cflags for word in ("-Xcompiler", flag)]
    else:
        compiler = find_cxx()
        flags = [*cxx_flags(compiler, tune), *extra_cflags]

    library = build_library(name, sources, compiler, flags)
    try:
        return tvm_ffi.load_module(str(library))
    except Exception as error:
        raise BuildError(f"{name}: {library} was built but does not load: {error}") from error


def cxx_flags(compiler: str, tune: Sequence[str]) -> list[str]:
    """Flags of every C++ build, with OpenMP where `compiler` has it."""
    return [*CXX_FLAGS, *tune, *([OPENMP_FLAG] if _supports_openmp(compiler) else [])]


def compile_ahead(
    name: str, sources: Sequence[str], cuda_arch: str, library: Path | None = None
) -> Path:
    """Put into the cache what `load_module` will look for on a machine with such a GPU; or write
    it to `library`.

    The GPU need not be here, and nothing is loaded. Raises `BuildError`.
    """
    nvcc, flags = find_nvcc(), _cuda_flags(cuda_arch)
    if library is None:
        return build_library(name, sources, nvcc, flags)
    _, command = _command(name, sources, nvcc, flags)
    library.parent.mkdir(parents=True, exist_ok=True)
    _compile(name, command, library)
    return library


def _cuda_flags(arch: str) -> list[str]:
    return [*CUDA_FLAGS, f"-arch={arch}"]


def build_library(
    name: str,
    sources: Sequence[str],
    compiler: str,
    flags: Sequence[str],
) -> Path:
    """Compile into the cache unless it is there already; one process at a time, atomically."""
    paths, command = _command(name, sources, compiler, flags)
    library = cache_dir() / f"{name}-{_cache_key(paths, compiler, flags)}.so"
    if library.is_file():
        return library
    from filelock import FileLock  # which torch requires too: it is there where a kernel is built

    with FileLock(library.with_suffix(".lock")):
        if not library.is_file():  # another process may have built it meanwhile
            _compile(name, command, library)
    return library


def _command(
    name: str,
    sources: Sequence[str],
    compiler: str,
    flags: Sequence[str],
) -> tuple[list[Path], list[str]]:
    """The sources' paths, and all of their compilation but where to."""
    from tvm_ffi import libinfo

    paths = [csrc_dir() / source for source in sources]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise BuildError(f"{name}: source not found: {', '.join(missing)}")
    runtime = Path(libinfo.find_libtvm_ffi())
    return paths, [
        compiler,
        *flags,
        f"-I{csrc_dir()}",
        *(f"-I{path}" for path in libinfo.include_paths()),
        "-shared",
        *map(str, paths),
        f"-L{runtime.parent}",
        "-ltvm_ffi",
    ]


def _compile(name: str, command: Sequence[str], library: Path) -> None:
    started = time.monotonic()
    logger.info("compiling %s, once (%s)", name, library.name)
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    command = [*command, "-o", str(unfinished)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
        output = done.stdout + done.stderr
        if done.returncode != 0:
            log = library.with_suffix(".log")
            with contextlib.suppress(OSError):
                log.write_text(f"{shlex.join(command)}\n{output}")
            raise BuildError(
                f"{name} does not compile: {first_errors(output)}\n"
                f"command: {shlex.join(command)}\nfull output: {log}"
            )
        os.replace(unfinished, library)
    finally:
        unfinished.unlink(missing_ok=True)
    logger.info("compiled %s in %.1f s: %s", name, time.monotonic() - started, library)


def first_errors(output: str) -> str:
    """The first lines of a compiler's output that report an error, or else its last lines."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return "\n".join((errors or lines[-_SHOWN_ERRORS:])[:_SHOWN_ERRORS]) or "(no output)"


def csrc_dir() -> Path:
    """The native sources: a package folder when installed, the checkout's folder otherwise."""
    spec = importlib.util.find_spec("sere_sglang.csrc")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).resolve().parents[2] / "csrc"


def cache_dir() -> Path:
    """Where built libraries are kept; made if need be."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"cannot create {folder} ({error}); set SERE_CACHE_DIR") from error
    return folder


def find_cxx() -> str:
    """The C++ compiler: ``CXX``, else c++, g++ or clang++ on PATH."""
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    raise BuildError("no C++ compiler found; install g++ or set CXX")


def find_nvcc() -> str:
    """nvcc of ``CUDA_HOME``, else the one on PATH or in /usr/local/cuda."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found:
        return found
    raise BuildError("no nvcc found; install the CUDA toolkit or set CUDA_HOME")


def detect_cuda_arch() -> str:
    """``sm_..`` of the current GPU, with the architecture-specific features of sm_90."""
    import torch

    if not torch.cuda.is_available():
        raise BuildError("no GPU to compile for; name an architecture, such as sm_90a")
    major, minor = torch.cuda.get_device_capability()
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


@functools.cache
def _supports_openmp(compiler: str) -> bool:
    """Whether a program using OpenMP compiles and links (clang may lack its runtime)."""
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n"
    command = [compiler, OPENMP_FLAG, "-x", "c++", "-", "-o", os.devnull]
    done = subprocess.run(command, input=program, capture_output=True, text=True)
    if done.returncode != 0:
        logger.warning("%s has no OpenMP; native CPU code runs on one thread", compiler)
    return done.returncode == 0


def _cache_key(sources: Sequence[Path], compiler: str, flags: Sequence[str]) -> str:
    """Of what is compiled, not of where it lies: a second checkout finds the first one's."""
    import tvm_ffi

    digest = hashlib.sha256()
    folders = {csrc_dir(), *(source.parent for source in sources)}
    headers = (p for f in folders for p in f.rglob("*") if p.suffix in _HEADER_SUFFIXES)
    for path in [*sources, *sorted(headers)]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    machine = _cpu_features() if TUNE_FLAG in flags else ""
    runtime = f"tvm-ffi {tvm_ffi.__version__}"
    for part in (compiler, *flags, _compiler_version(compiler), runtime, machine):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


@functools.cache
def _compiler_version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return done.stdout


@functools.cache
def _cpu_features() -> str:
    """What -march=native may depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    seen = {line.split(":")[0].strip(): line for line in reversed(lines) if ":" in line}
    return "\n".join(seen[key] for key in wanted if key in seen)
