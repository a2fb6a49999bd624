"""The CPU MoE runner for every instruction set: built for all, chosen, refused, run elsewhere."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sere_sglang.cpu import isa as cpu_isa
from sere_sglang.cpu import moe as cpu_moe
from sere_sglang.cpu.floor import measure_floor
from sere_sglang.cpu.isa import ISAS, X86
from sere_sglang.errors import SereError
from sere_sglang.ops import jit

CHECK = Path(__file__).parent / "native" / "cpu_moe_check.cpp"
ON_X86 = platform.machine() in ("x86_64", "AMD64")
HERE = cpu_isa.executable()


@pytest.mark.parametrize("isa", [*X86, "portable"] if ON_X86 else ["portable"])
def test_it_compiles_for_every_instruction_set(isa: str) -> None:
    """Also for those that this machine does not execute."""
    assert cpu_moe.compile_for(isa).is_file()


def test_the_best_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERE_CPU_ISA", raising=False)
    assert cpu_moe.isa() == HERE[0]
    assert HERE[-1] == "portable"
    assert list(HERE) == [name for name in ISAS if name in HERE]


@pytest.mark.parametrize("isa", HERE)
def test_the_variable_forces_one(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("SERE_CPU_ISA", isa)
    assert cpu_moe.isa() == isa
    assert cpu_moe.native_module() is cpu_moe.native_module(isa)


def test_what_does_not_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_isa, "executable", lambda: ("avx2", "portable"))
    monkeypatch.setenv("SERE_CPU_ISA", "amx")
    with pytest.raises(SereError) as refused:
        cpu_isa.isa()
    assert str(refused.value) == (
        "SERE_CPU_ISA=amx is not executable here; this machine can execute: avx2, portable"
    )


@pytest.mark.parametrize(
    ("flags", "without"),
    [
        ("avx avx2 fma", ["avx512", "avx512bf16", "amx"]),
        ("avx2", ["avx2", "avx512", "avx512bf16", "amx"]),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl", ["avx512bf16", "amx"]),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl avx512_bf16 amx_tile", ["amx"]),
    ],
)
def test_it_follows_from_the_processor(
    monkeypatch: pytest.MonkeyPatch, flags: str, without: list[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_isa, "_cpu_flags", lambda: frozenset(flags.split()))
    found = cpu_isa.executable.__wrapped__()
    assert list(found) == [name for name in ISAS if name not in without]


@pytest.mark.parametrize("command", ["doctor", "doctor --build", "doctor --model x --device cpu"])
def test_doctor_refuses_it(command: str) -> None:
    _refused([sys.executable, "-m", "sere_sglang.cli.main", *command.split()])


def test_the_benchmark_refuses_it() -> None:
    _refused([sys.executable, "-m", "benchmarks.cpu_moe"])


def _refused(command: list[str]) -> None:
    done = subprocess.run(
        command,
        env={**os.environ, "SERE_CPU_ISA": "avx3"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "sere-sglang: error: SERE_CPU_ISA=avx3 is unknown; this machine can execute: "
        f"{', '.join(HERE)}\n"
    )


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("hidden", [64, 50, 1120])
def test_a_row_does_not_depend_on_its_company(isa: str, hidden: int) -> None:
    """Bit for bit: alone, in another place, among any number of rows."""
    generator = torch.Generator().manual_seed(hidden)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(70, hidden).bfloat16()
    w13 = (normal(6, 64, hidden) / hidden**0.5).bfloat16()
    w2 = (normal(6, hidden, 32) / 6).bfloat16()
    ids = torch.randint(0, 6, (70, 3), generator=generator)
    weights = torch.rand(70, 3, generator=generator)

    def run(rows: torch.Tensor) -> torch.Tensor:
        return cpu_moe.fused_moe(x[rows], w13, w2, ids[rows], weights[rows], isa=isa)

    everything = run(torch.arange(70))
    assert torch.equal(run(torch.arange(70)), everything)
    for count in (1, 2, 3, 5, 8, 13, 21, 34, 55):
        rows = torch.randperm(70, generator=generator)[:count]
        assert torch.equal(run(rows), everything[rows]), f"{count} rows"


@pytest.mark.parametrize("isa", HERE)
def test_the_floor_is_measured(isa: str) -> None:
    floor = measure_floor(0.01, isa)
    assert floor.isa == isa
    assert floor.read_gb_s > 0 and floor.float32_gflop_s > 0
    gigabytes, operations = 10 * floor.read_gb_s, 1e9 * floor.float32_gflop_s
    assert floor.seconds(1e9 * gigabytes, operations) == pytest.approx(10.0)


CROSS = "aarch64-linux-gnu-g++", "qemu-aarch64"
NATIVE = [name for name in HERE if name != "amx"]


@pytest.mark.parametrize("isa", NATIVE)
def test_kernels_as_a_program(isa: str, tmp_path: Path) -> None:
    """Against float64, without Python: what the next test does for another processor."""
    compiler = jit.find_cxx()
    _run_check([compiler, *jit.cxx_flags(compiler, ISAS[isa].cflags)], [], tmp_path)


@pytest.mark.skipif("avx512bf16" not in HERE, reason="its token rows are packed with AVX-512 BF16")
def test_tiles_where_the_processor_has_none(tmp_path: Path) -> None:
    """The engine of AMX over tile instructions in plain C++."""
    compiler, flags = jit.find_cxx(), (*ISAS["avx512bf16"].cflags, "-DSERE_EMULATED_AMX")
    said = _run_check([compiler, *jit.cxx_flags(compiler, flags)], [], tmp_path)
    assert said.count("ok tiles") == 6


@pytest.mark.skipif(
    not all(map(shutil.which, CROSS)), reason=f"needs {' and '.join(CROSS)} (apt: qemu-user)"
)
def test_kernels_on_aarch64(tmp_path: Path) -> None:
    _run_check([CROSS[0], *jit.CXX_FLAGS, "-static"], [CROSS[1]], tmp_path)


def _run_check(compiler: list[str], emulator: list[str], folder: Path) -> str:
    program = folder / "check"
    command = [*compiler, f"-I{jit.csrc_dir()}", str(CHECK), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ok ") >= 20 and "FAILED" not in done.stdout
    return done.stdout
