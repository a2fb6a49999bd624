"""What cannot be served is refused at start, by the real command line, in one or two lines."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sere_sglang.profile import SereProfile, save_profile
from tests.server.harness import refusal_of, run_to_exit
from tests.server.profiles import random_profile, without_profile, write_profile

Checkpoint = Callable[[str], Path]


def _refused(*flags: str) -> str:
    """The refusal of ``sglang serve`` with these flags."""
    return _message(refusal_of(*flags))


def _message(result: subprocess.CompletedProcess[str]) -> str:
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("sere-sglang: error:")]
    assert result.returncode == 2, result.stderr[-2000:]
    assert len(errors) == 1, result.stderr[-2000:]
    assert not any("Traceback" in line for line in lines)
    assert not any("Load weight begin" in line for line in lines)
    return errors[0]


def _with_profile(model: Path, path: Path) -> str:
    return _refused(f"--model-path={model}", "--moe-backend=sere", f"--sere-profile={path}")


def _edited(model: Path, path: Path, edit: Callable[[SereProfile], object]) -> Path:
    profile = random_profile(model)
    edit(profile)
    save_profile(profile, path)
    return path


def test_no_profile_to_be_found(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bare = without_profile(checkpoint("qwen3_moe"), tmp_path / "bare")
    # A process of its own, as a user has it.
    message = _message(run_to_exit(f"--model-path={bare}", "--moe-backend=sere"))
    assert "--sere-profile" in message
    assert f"sere-sglang calibrate --model {bare}" in message


def test_a_flag_of_sglangs_that_rules_it_out(checkpoint: Checkpoint) -> None:
    model = f"--model-path={checkpoint('qwen3_moe')}"
    message = _refused(model, "--moe-backend=sere", "--enable-pdmux")
    assert "with --enable-pdmux prefill and decode run at the same time" in message


def test_more_experts_than_there_are(checkpoint: Checkpoint) -> None:
    model = f"--model-path={checkpoint('qwen3_moe')}"
    flags = ("--moe-backend=sere", "--sere-rule=budget", "--sere-max-experts=17")
    assert "--sere-max-experts 17: a layer has 16 experts" in _refused(model, *flags)


def test_named_profile_is_missing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    message = _with_profile(checkpoint("qwen3_moe"), tmp_path / "absent.safetensors")
    assert "--sere-profile" in message and "absent.safetensors" in message
    assert "sere-sglang calibrate" in message


def test_profile_of_another_model(checkpoint: Checkpoint) -> None:
    other = checkpoint("olmoe") / "sere_profile.safetensors"
    message = _with_profile(checkpoint("qwen3_moe"), other)
    assert "OlmoeForCausalLM" in message and "Qwen3MoeForCausalLM" in message
    assert str(other) in message


def test_experts_do_not_match(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def shrink(profile: SereProfile) -> None:
        profile.similarity = {i: m[:8, :8] for i, m in profile.similarity.items()}

    model = checkpoint("qwen3_moe")
    message = _with_profile(model, _edited(model, tmp_path / "p.safetensors", shrink))
    assert "experts: profile 8, model 16" in message


def test_layers_do_not_match(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = checkpoint("qwen3_moe")
    path = _edited(model, tmp_path / "p.safetensors", lambda p: p.similarity.pop(1))
    assert "MoE layers: profile [0, 2], model [0, 1, 2]" in _with_profile(model, path)


@pytest.mark.parametrize(("value", "named"), [(float("nan"), "NaN"), (1.5, "outside [0, 1]")])
def test_impossible_similarity(
    checkpoint: Checkpoint, tmp_path: Path, value: float, named: str
) -> None:
    def spoil(profile: SereProfile) -> None:
        profile.similarity[2][3, 5] = value

    model = checkpoint("qwen3_moe")
    path = _edited(model, tmp_path / "p.safetensors", spoil)
    message = _with_profile(model, path)
    assert "layers.2.similarity" in message and named in message and str(path) in message


def test_truncated_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = checkpoint("qwen3_moe")
    path = write_profile(model, tmp_path / "p.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: not a readable safetensors file" in _with_profile(model, path)


def test_other_file_types(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    torch.save({"layers.0.similarity": torch.eye(16)}, path)
    assert f"{path}: not a readable" in _with_profile(checkpoint("qwen3_moe"), path)


def test_newer_format(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def renumber(profile: SereProfile) -> None:
        profile.metadata = dataclasses.replace(profile.metadata, format_version="9.0")

    model = checkpoint("qwen3_moe")
    path = _edited(model, tmp_path / "p.safetensors", renumber)
    assert "upgrade sere-sglang" in _with_profile(model, path)


def test_weights_changed_since_calibration(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = checkpoint("qwen3_moe")
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in model.iterdir():
        if file.name != "model.safetensors":
            (changed / file.name).symlink_to(file)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    message = _refused(f"--model-path={changed}", "--moe-backend=sere")
    assert "weights: profile" in message and "sere-sglang calibrate" in message


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--sere-primary-k=0", "--sere-primary-k 0: must be at least 1"),
        ("--sere-primary-k=4", "--sere-primary-k 4: must be smaller than the model's top-k (4"),
        ("--sere-threshold=1.5", "--sere-threshold 1.5: must lie in [0, 1]"),
        ("--sere-threshold=-0.1", "--sere-threshold -0.1"),
        ("--sere-max-batch=0", "--sere-max-batch 0"),
    ],
)
def test_settings_out_of_range(checkpoint: Checkpoint, flag: str, named: str) -> None:
    model = checkpoint("qwen3_moe")
    assert named in _refused(f"--model-path={model}", "--moe-backend=sere", flag)


def test_dense_model(checkpoint: Checkpoint) -> None:
    message = _refused(f"--model-path={checkpoint('dense')}", "--moe-backend=sere")
    assert "Qwen3ForCausalLM" in message and "dense" in message


def test_sere_flags_without_the_backend(checkpoint: Checkpoint) -> None:
    message = _refused(f"--model-path={checkpoint('qwen3_moe')}", "--sere-primary-k=2")
    assert "--sere-primary-k given without --moe-backend sere" in message


@pytest.mark.parametrize("value", ["avx1024", "AVX2"])
def test_instruction_set_that_does_not_run_here(checkpoint: Checkpoint, value: str) -> None:
    flags = [f"--model-path={checkpoint('qwen3_moe')}", "--moe-backend=sere"]
    message = _message(refusal_of(*flags, env={"SERE_CPU_ISA": value}))
    assert message.startswith(f"sere-sglang: error: SERE_CPU_ISA={value} is unknown; this machine")
    assert "portable" in message
