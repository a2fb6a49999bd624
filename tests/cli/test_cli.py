"""The ``sere-sglang`` command without an engine: help, doctor, inspect, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import sere_sglang
from sere_sglang.calibration import CalibrationJob, Interrupted
from sere_sglang.calibration.collection import CollectionSpec, block_tokens, check_enough
from sere_sglang.cli import calibrate_flow, doctor
from sere_sglang.cli.main import app
from sere_sglang.errors import SereError
from sere_sglang.options import OPTIONS
from sere_sglang.profile import save_profile
from tests.cli.command import WIDE, run
from tests.cli.made_profile import a_profile
from tests.server.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_checkpoint("dense", folder / "dense")
    write_checkpoint("qwen3_moe", folder / "moe")
    return folder


def test_help_names_the_server_flags_and_where_they_are_described() -> None:
    code, output = run("--help")
    assert code == 0
    assert "python -m sglang.launch_server --help" in " ".join(output.split())
    for option in OPTIONS.values():
        assert option.flag in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unheard-of"], "No such command 'unheard-of'"),
        (["inspect"], "Missing argument 'profile'"),
        (["inspect", "x", "--unheard-of"], "No such option: --unheard-of"),
        (["inspect", "/absent"], "/absent: no such file"),
        (["inspect", "{profile}", "--plot", "{profile}/x.png"], "x.png: cannot be written"),
        (["calibrate"], "Missing option '--model'"),
        (
            ["calibrate", "--model", "x", "--out", "y", "--length", "1"],
            "Invalid value for '--length'",
        ),
        (["doctor", "--model", "x", "--build"], "--build and --cuda-arch"),
        (["doctor", "--model", "x", "--device", "tpu"], "--device tpu: choose from"),
        (["doctor", "--out", "x"], "goes with --model MODEL"),
        (["doctor", "--cuda-arch", "x"], "--cuda-arch x goes with --build"),
        (["simulate", "--profile", "/absent", "--cost", "/absent"], "/absent: no such file"),
        (["simulate", "--profile", "x"], "Missing option '--cost'"),
        (["bench"], "give --model MODEL"),
        (["bench", "--model", "x", "--url", "y"], "or --url URL of one that runs"),
        (["evaluate"], "give --model MODEL"),
        (["tune"], "give --model MODEL"),
        (
            ["evaluate", "--model", "x", "--out", "{folder}", "--text", "/absent"],
            "/absent: no such",
        ),
        (["tune", "--model", "x", "--out", "{folder}", "--text", "{folder}"], "a folder; name one"),
        (["doctor", "--model", "/absent/model"], "--model /absent/model is neither a folder nor"),
        (["doctor", "--model", "../absent"], "--model ../absent is neither a folder nor"),
        (["top", "--every", "often"], "Invalid value for '--every'"),
        (["top", "--every", "-1"], "Invalid value for '--every': -1 is no finite number above 0"),
        (["top", "--every", "0"], "Invalid value for '--every': 0 is no finite number above 0"),
        (["top", "--every", "nan"], "Invalid value for '--every'"),
        (["top", "--every", "1e9"], "Invalid value for '--every'"),
        (["top", "--looks", "-1"], "Invalid value for '--looks'"),
        (["top", "http://127.0.0.1:9", "--looks", "1"], "no SGLang server answers at"),
    ],
)
def test_every_user_error_has_one_form(tmp_path: Path, arguments: list[str], message: str) -> None:
    profile = tmp_path / "p.safetensors"
    save_profile(a_profile(), profile)
    given = [a.format(profile=profile, folder=tmp_path) for a in arguments]
    result = CliRunner().invoke(app, given, env=WIDE)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("sere-sglang: error: ") and message in result.stderr
    assert result.stderr.count("sere-sglang: error: ") == 1 and result.stdout == ""


def test_no_argument_at_all_shows_the_help() -> None:
    code, output = run()
    assert code == 2 and "calibrate" in output and "error:" not in output


def test_the_form_of_an_error_is_written_once() -> None:
    root = Path(sere_sglang.__file__).parents[1]
    folders = ("sere_sglang", "patches", "benchmarks", "tools", "launch")
    sources = [path for folder in folders for path in (root / folder).rglob("*.py")]
    with_prefix = [path.name for path in sources if '"sere-sglang: error:' in path.read_text()]
    assert with_prefix == ["errors.py"]


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("sere-sglang")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "calibrate" in done.stdout


def test_doctor_reports_what_serving_needs() -> None:
    code, output = run("doctor")
    assert code == 0, output
    assert "sere -> sere_sglang.plugin:register" in output
    assert f"torch{'':21}{'':1}{torch.__version__.split('+')[0]}" in output
    assert "reroute torch on cpu" in output


def fake_nvcc(folder: Path, body: str) -> None:
    """An nvcc in `folder`/bin that answers to --version and otherwise runs `body`."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{body}\n')
    nvcc.chmod(0o755)


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CUDA_HOME, with nothing in it yet, and an empty cache."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("SERE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_build_moe_runner", list)  # a long compile, not of interest here
    monkeypatch.setattr(doctor, "_report_implementations", lambda build: [])
    return tmp_path / "cuda"


def test_doctor_compiles_every_library_ahead_of_time(toolkit: Path) -> None:
    fake_nvcc(toolkit, 'while [ "$1" != -o ]; do shift; done; echo library > "$2"')
    code, output = run("doctor", "--build", "--cuda-arch", "sm_90a")
    assert code == 0, output
    assert "CUDA kernels for sm_90a" in output
    built = sorted(path.name.split("-")[0] for path in (toolkit.parent / "cache").glob("*.so"))
    assert built == ["fused", "reroute", "rules", "rules_fused"]


def test_doctor_shows_the_compilers_error(toolkit: Path) -> None:
    fake_nvcc(toolkit, "echo \"reroute.cu(3): error: expected a ';'\" >&2; exit 1")
    code, output = run("doctor", "--build", "--cuda-arch", "sm_90a")
    assert code == 1
    assert "do not build for sm_90a" in output and "expected a ';'" in output


def test_doctor_says_when_there_is_no_nvcc(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sere_sglang.ops.jit.shutil.which", lambda _: None)
    code, output = run("doctor", "--build", "--cuda-arch", "sm_90a")
    assert code == 1
    assert "no nvcc found; install the CUDA toolkit or set CUDA_HOME" in output


@pytest.mark.parametrize("flags", [["--cuda-arch", "sm_90a"], ["--build", "--cuda-arch", "h200"]])
def test_doctor_refuses_an_architecture_that_it_cannot_use(flags: list[str]) -> None:
    code, output = run("doctor", *flags)
    assert code == 2
    assert "sm_90a (H100, H200)" in output


def test_calibrate_prints_names_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise Interrupted

    monkeypatch.setattr(calibrate_flow, "calibrate", interrupted)
    out = tmp_path / "[/]\x1b[31m"
    with pytest.raises(typer.Exit):
        calibrate_flow.run(CalibrationJob(model="[bold]x[/]", out=out, spec=CollectionSpec()))
    said = capsys.readouterr().err
    assert "Calibrating [bold]x[/]: " in said and "/[/]\\x1b[31m.partial;" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{folder}/dense"], "dense model"),
        (["--model", "{folder}"], "config.json: no such file"),
        (["--model", "{folder}/absent"], "is neither a folder nor a model that the hub gives"),
        (["--model", "{folder}/moe", "--measure", "x"], "--measure x: choose from frobenius"),
        (["--model", "{folder}/moe", "--weighting", "x"], "--weighting x: choose from all, routed"),
        (["--model", "{folder}/moe", "--tokens", "0"], "--tokens 0: give a number of tokens"),
        (
            ["--model", "{folder}/moe", "--measure", "cka", "--tokens", "99", "--tokens", "routed"],
            "--weighting routed",
        ),
        (
            ["--model", "{folder}/moe", "--measure", "cka", "--weighting", "routed"],
            "drop one of the two",
        ),
        (["--model", "{folder}/moe", "--memory", "lots"], "--memory lots: not a size"),
        (["--model", "{folder}/moe", "--device", "tpu"], "--device tpu: choose from"),
        (["--model", "{folder}/moe", "--data", "{folder}/none.txt"], "none.txt: no such file"),
        (["--model", "{folder}/moe", "--out", "{folder}"], "is a folder; name the file"),
    ],
)
def test_calibrate_refuses_before_the_model_loads(
    folder: Path, arguments: list[str], message: str
) -> None:
    code, output = run("calibrate", *(a.format(folder=folder) for a in arguments))
    assert code == 2
    assert output.startswith("sere-sglang: error: ") and message in output
    assert "Traceback" not in output


def test_if_missing_leaves_a_profile_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    out.write_bytes(b"x")
    model = ("--model", str(folder / "moe"), "--if-missing")
    code, output = run("calibrate", *model, "--out", str(out))
    assert code == 0 and f"{out} is there already" in output and out.read_bytes() == b"x"
    beside = folder / "moe" / "sere_profile.safetensors"
    beside.write_bytes(b"y")
    try:
        code, output = run("calibrate", *model)
        assert code == 0 and f"{beside} is there already" in output
    finally:
        beside.unlink()


def test_an_unfinished_calibration_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    partial = tmp_path / "p.safetensors.partial"
    partial.write_bytes(b"x")
    code, output = run("calibrate", "--model", str(folder / "moe"), "--out", str(out))
    assert code == 2 and str(partial) in output and "--resume" in output
    assert partial.read_bytes() == b"x"


def test_too_few_tokens_says_how_many_are_needed() -> None:
    check_enough(128, ("frobenius", "cka"), 128)
    with pytest.raises(SereError, match="--measure cka needs at least 128 tokens"):
        check_enough(100, ("frobenius", "cka"), 100)


def test_too_little_memory_says_how_much_is_needed() -> None:
    small = CollectionSpec(memory=1 << 20)
    with pytest.raises(SereError, match=r"at least --memory \d+MiB") as error:
        block_tokens(small, num_experts=128, hidden=2048, width=768)
    enough = int(str(error.value).split("at least --memory ")[1].removesuffix("MiB"))
    assert block_tokens(CollectionSpec(memory=enough << 20), 128, 2048, 768) >= 16


@pytest.mark.parametrize("ignores_interrupts", [False, True], ids=["", "in the background"])
def test_sigterm_leaves_like_ctrl_c(ignores_interrupts: bool) -> None:
    """So that servers which a command started end with it."""
    program = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN if IGNORES else signal.default_int_handler)
from sere_sglang.cli.main import terminated_as_interrupted
with terminated_as_interrupted():
    try:
        print("started", flush=True)
        for _ in range(600):  # a signal just before a long sleep would wait for its end
            time.sleep(0.1)
    finally:
        print("cleaned up", flush=True)
"""
    command = [sys.executable, "-c", program.replace("IGNORES", str(ignores_interrupts))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"started\n"
        process.terminate()
        out, _ = process.communicate(timeout=30)
    assert out == b"cleaned up\n"
    assert process.returncode == (128 + 15 if ignores_interrupts else -2)
