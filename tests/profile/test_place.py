"""Where a model's profile is looked for and written: folders, hub snapshots, the user's cache."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import save_file

from sere_sglang.calibration import CalibrationJob, default_out, existing_profile, revision_of
from sere_sglang.calibration.collection import CollectionSpec
from sere_sglang.errors import SereError
from sere_sglang.on_demand import calibrated
from sere_sglang.options import SereConfig
from sere_sglang.preflight import prepare
from sere_sglang.profile import (
    AUTO,
    MoeModelInfo,
    ProfileError,
    find_profile,
    model_files,
    save_profile,
)
from tests.profile.samples import METADATA, a_matrix, a_model, a_profile

OTHER = "2" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub cache of a machine without network: one model in two revisions."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("SERE_CACHE_DIR", str(tmp_path / "cache"))
    model = tmp_path / "hub" / "models--some--moe"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("1" * 40)
    for seed in (1, 2):
        _write_model(model / "snapshots" / (str(seed) * 40), seed)
    return model / "snapshots" / ("1" * 40)


def test_revisions_of_a_hub_model_are_told_apart(hub: Path) -> None:
    main, other = (
        dataclasses.replace(a_model("some/moe"), revision=revision).weights
        for revision in (None, OTHER)
    )
    assert main and other and main != other
    assert a_model("not/here").weights == ""


def test_a_checkpoint_that_is_still_being_downloaded_has_no_fingerprint(hub: Path) -> None:
    (hub / "model.safetensors").rename(hub / "model-00001-of-00002.safetensors")
    assert a_model("some/moe").weights == ""
    shards = {name: f"model-0000{name}-of-00002.safetensors" for name in "12"}
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert a_model("some/moe").weights == ""
    with pytest.raises(ProfileError, match="its safetensors files are not all here"):
        default_out("some/moe", None)
    save_file({"w": a_matrix(20, 3)}, hub / shards["2"])
    assert a_model("some/moe").weights != ""


def test_weights_are_read_once_in_a_run(hub: Path) -> None:
    """Each of these wants to know them, and may be of a model with hundreds of files."""
    model_files._fingerprint.cache_clear()
    assert existing_profile("some/moe", None) is None
    job = CalibrationJob("some/moe", default_out("some/moe", None), CollectionSpec())
    before = job.weights
    assert before in job.out.name and a_model("some/moe").weights == before
    assert model_files._fingerprint.cache_info().misses == 1
    save_file({"w": a_matrix(20, 3)}, hub / "model.safetensors")
    assert a_model("some/moe").weights != before


def test_a_hub_model_may_ship_its_profile(hub: Path) -> None:
    with pytest.raises(ProfileError) as error:
        find_profile(a_model("some/moe"))
    assert "'sere-sglang calibrate --model some/moe'" in str(error.value)
    assert "--sere-profile auto" in str(error.value)
    save_profile(a_profile(), hub / "sere_profile.safetensors")
    assert find_profile(a_model("some/moe")) == hub / "sere_profile.safetensors"
    other = dataclasses.replace(a_model("some/moe"), revision=OTHER)
    with pytest.raises(ProfileError, match=f"--model some/moe -- --revision {OTHER}'"):
        find_profile(other)


@pytest.mark.parametrize("revision", [None, OTHER])
def test_a_server_looks_where_calibrate_writes_for_a_hub_model(
    hub: Path, tmp_path: Path, revision: str | None
) -> None:
    out = default_out("some/moe", revision)
    assert out.parent == tmp_path / "cache" / "profiles"
    save_profile(a_profile(), out)
    assert find_profile(dataclasses.replace(a_model("some/moe"), revision=revision)) == out
    # The other revision, a finetune or a base model, has its own.
    other = None if revision else OTHER
    assert default_out("some/moe", other) != out
    with pytest.raises(ProfileError):
        find_profile(dataclasses.replace(a_model("some/moe"), revision=other))
    # A snapshot named by its path is still the hub's.
    assert default_out(str(hub.parent / (revision or "1" * 40)), None) == out


def test_a_folder_keeps_its_profile_unless_it_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERE_CACHE_DIR", str(tmp_path / "cache"))
    folder = _write_model(tmp_path / "model", 1)
    assert default_out(str(folder), None) == folder / "sere_profile.safetensors"
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs the tests
    cached = default_out(str(folder), None)
    assert cached.is_relative_to(tmp_path / "cache")
    save_profile(a_profile(), cached)
    assert find_profile(MoeModelInfo.from_folder(folder)) == cached


def test_what_is_no_model_is_refused_by_name(hub: Path) -> None:
    for name in ("some/other", "no folder", "x" * 500):
        with pytest.raises(SereError, match="neither a folder nor a model that the hub") as error:
            default_out(name, None)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    (hub / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(SereError, match=r"--model: .*dense model"):
        default_out("some/moe", None)


def test_revision_is_sglangs_own_flag() -> None:
    assert revision_of(["--tp", "2", "--revision", "v1"]) == "v1"
    assert revision_of(["--revision=v1", "--tp=2"]) == "v1"
    assert revision_of(["--tp", "2"]) is None and revision_of([]) is None


def test_auto_calibrates_only_what_has_no_profile(tmp_path: Path) -> None:
    folder = _write_model(tmp_path / "model", 1)
    config = json.loads((folder / "config.json").read_text())
    asked = SereConfig(moe_backend="sere", sere_profile=AUTO)
    calls = []

    def calibrate(model: MoeModelInfo) -> Path:
        calls.append(model.name)
        metadata = dataclasses.replace(METADATA, fingerprint=model.fingerprint)
        out = folder / "sere_profile.safetensors"
        save_profile(dataclasses.replace(a_profile(), metadata=metadata), out)
        return out

    for _ in range(2):
        resolved = prepare(str(folder), config, asked, calibrate=calibrate)
        assert resolved.sere_profile == str(folder / "sere_profile.safetensors")
    assert calls == [str(folder)]


def test_auto_that_may_not_write_says_so(tmp_path: Path) -> None:
    folder = _write_model(tmp_path / "model", 1)
    (folder / "sere_profile.safetensors.lock").mkdir()
    with pytest.raises(SereError, match=r"--sere-profile auto: cannot write .*SERE_CACHE_DIR"):
        calibrated(MoeModelInfo.from_folder(str(folder)), [], [])


def _write_model(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    config = {
        "architectures": [METADATA.architecture],
        "num_hidden_layers": METADATA.num_layers,
        "num_experts": METADATA.num_experts,
        "num_experts_per_tok": METADATA.top_k,
        "hidden_size": METADATA.hidden_size,
        "mlp_only_layers": [1],
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": a_matrix(20, seed)}, folder / "model.safetensors")
    return folder
