"""``sere-sglang doctor``: does this environment have what SERE needs, and what would it use; with
``--model``, what that model's layers take."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from sere_sglang.errors import SereError

_ENTRY_POINTS = {
    "sglang.srt.plugins": "sere_sglang.plugin",
    "sglang.serve_backends": "sere_sglang.serve_backend",
    "sglang.srt.platforms": "sere_sglang.patches.cpu_engine",
}
_COMPILERS = ("g++", "clang++", "nvcc", "ninja")


def command(
    build: Annotated[
        bool, typer.Option("--build", help="Compile the kernels now instead of at first use.")
    ] = False,
    cuda_arch: Annotated[
        str | None,
        typer.Option(
            metavar="sm_90a",
            help="With --build: compile the CUDA kernels for such a GPU too, be it here or not, as "
            "when building an image.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Start this model in SGLang, time its MoE layers and print what they take, "
            "instead of the report. Needs no profile.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --model: write the table, for --sere-cost and for simulate --cost.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="With --model: auto, cpu or cuda.")] = "auto",
    server_args: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- SGLANG FLAGS]",
            help="With --model: as the server will get them, for instance: -- --tp 2",
        ),
    ] = None,
) -> None:
    """Report versions, plugin entry points, compilers and the re-routing kernels at hand.

    Exits with status 1 when something that serving needs is missing, or does not build. With
    --model: what a MoE layer of that model takes, by rows and active experts, beside the least
    that this machine could take.
    """
    if model is not None:
        if build or cuda_arch is not None:
            raise SereError("--build and --cuda-arch report on kernels, not on a --model: drop one")
        _report_model(model, out, device, tuple(server_args or ()))
        return
    if out is not None or server_args or device != "auto":
        raise SereError("--out (like --device and SGLang's flags) goes with --model MODEL: add it")
    if cuda_arch is not None and not (build and re.fullmatch(r"sm_\d{2,3}[af]?", cuda_arch)):
        raise SereError(
            f"--cuda-arch {cuda_arch} goes with --build and names an architecture: sm_80 (A100), "
            "sm_90a (H100, H200), sm_100 (B200)"
        )
    isa = _isa()
    problems = [*_report_versions(), *_report_plugin()]
    _report_compilers()
    _line("MoE runner on cpu", isa)
    problems += _report_implementations(build)
    if build:
        problems += _build_moe_runner()
    if cuda_arch is not None:
        problems += _compile_for(cuda_arch)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(1)
    print("everything that serving needs is here")


def _report_model(model: str, out: Path | None, device: str, server_args: tuple[str, ...]) -> None:
    from sere_sglang.cli import doctor_model

    if device not in ("auto", "cpu", "cuda"):
        raise SereError(f"--device {device}: choose from auto, cpu, cuda")
    try:
        doctor_model.run(model, out, device, server_args)
    except doctor_model.Interrupted:
        print("stopped", file=sys.stderr, flush=True)
        os._exit(130)  # at a usual exit SGLang's sockets wait for processes that have ended


def _isa() -> str:
    from sere_sglang.cpu import isa as cpu_isa

    name, here = cpu_isa.isa(), cpu_isa.executable()
    return f"{name}; this machine can execute: {', '.join(here)} ({cpu_isa.VARIABLE} forces one)"


def _report_versions() -> list[str]:
    problems = []
    _line("python", f"{platform.python_version()} ({sys.executable})")
    for package in ("sere-sglang", "sglang", "torch", "apache-tvm-ffi", "triton"):
        version = _version(package)
        _line(package, version or "missing")
        if version is None and package != "triton":
            problems.append(f"{package} is not installed; pip install {package}")
    return problems


def _report_plugin() -> list[str]:
    problems = []
    for group, module in _ENTRY_POINTS.items():
        found = [e for e in metadata.entry_points(group=group) if e.value.startswith(module)]
        _line(group, ", ".join(f"{e.name} -> {e.value}" for e in found) or "missing")
        if not found:
            problems.append(
                f"SGLang would not find the plugin: entry point group {group} lacks it; "
                "reinstall sere-sglang (pip install -e . in a checkout)"
            )
    return problems


def _report_compilers() -> None:
    for compiler in _COMPILERS:
        _line(compiler, shutil.which(compiler) or "not on PATH")


def _report_implementations(build: bool) -> list[str]:
    """One line per device and implementation. Kernels are compiled only when `build`."""
    import importlib

    import torch

    from sere_sglang.ops import fused
    from sere_sglang.ops.cuda import rules, rules_fused
    from sere_sglang.ops.dispatch import IMPLEMENTATIONS, PREFERENCE, load_impl
    from sere_sglang.ops.jit import BuildError

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    _line("gpu", torch.cuda.get_device_name() if "cuda" in devices else "none")
    problems = []
    for device in devices:
        for name in PREFERENCE[device]:
            try:
                reason = importlib.import_module(IMPLEMENTATIONS[name]).is_available(device)
            except ImportError as error:
                reason = str(error)
            if reason is None and build:
                try:
                    load_impl(name, device)
                    if name == "cuda":
                        fused.build()
                        rules.build()
                        rules_fused.build()
                except BuildError as error:
                    problems.append(f"reroute {name} on {device} does not build: {error}")
                    reason = "does not build"
            state = reason or ("built" if build else "available")
            _line(f"reroute {name} on {device}", state)
    if build and "cuda" not in devices:
        _line("reroute cuda", "no GPU here; --cuda-arch sm_90a compiles for one")
    return problems


def _compile_for(arch: str) -> list[str]:
    from sere_sglang.ops.cuda import library
    from sere_sglang.ops.jit import BuildError, cache_dir

    try:
        library.compile_for(arch)
    except BuildError as error:
        return [f"the CUDA kernels do not build for {arch}: {error}"]
    _line(f"CUDA kernels for {arch}", f"compiled, in {cache_dir()}")
    return []


def _build_moe_runner() -> list[str]:
    from sere_sglang.cpu.moe import isa, native_module
    from sere_sglang.ops.jit import BuildError

    try:
        native_module()
    except BuildError as error:
        return [f"the CPU MoE runner does not build: {error}"]
    _line("MoE runner on cpu", f"built for {isa()}")
    return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _line(name: str, value: str) -> None:
    print(f"{name:26} {value}")
