"""``calibrate --surrogate-rank``: what is refused, resumed, written and shown."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from sere_sglang.calibration import CalibrationJob, Interrupted, calibrate, layer_by_layer
from sere_sglang.calibration.collection import CollectionSpec, SurrogateSpec, block_tokens
from sere_sglang.calibration.surrogate_fit import evaluated_ranks
from sere_sglang.errors import SereError
from sere_sglang.profile import ProfileError, SereProfile, load_profile, save_profile
from sere_sglang.profile.surrogate_report import surrogate_reports
from sere_sglang.profile.surrogate_tables import SURROGATE_CHECKS
from tests.calibration.layer_jobs import LENGTH, TOKENS, a_job, same_everywhere, write_float32
from tests.cli.command import run
from tests.profile.samples import a_profile
from tests.server.checkpoints import EXPERTS, HIDDEN, LAYERS, moe_layer_ids

MODEL = "deepseek_v2"
SERVED = ("surrogate_in", "surrogate_out", "surrogate_bias")
FLOATS = (*SERVED, "surrogate_explained", "expert_energy")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_float32(MODEL, tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    same_everywhere(monkeypatch)


def job_with(model: Path, out: Path, rank: int | None, **changes: Any) -> CalibrationJob:
    spec = CollectionSpec(memory=1 << 24, surrogates=SurrogateSpec(rank, LENGTH))
    return a_job(model, out, **{"spec": spec, "num_tokens": 4 * TOKENS, **changes})


@pytest.fixture(scope="module")
def profile(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "p.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        same_everywhere(patch)
        calibrate(job_with(model, out, 8))
    return out


def test_a_profile_with_surrogates(profile: Path, model: Path) -> None:
    loaded = load_profile(profile)
    assert loaded.metadata.format_version == "1.4"
    assert loaded.metadata.method_parameters["surrogate_rank"] == 8
    reports = surrogate_reports(loaded)
    assert [r.layer for r in reports] == moe_layer_ids(MODEL)
    for layer, tables in loaded.tables.items():
        assert tables["surrogate_ranks"].tolist() == [4, 8, 16, 32, 64]
        assert tables["surrogate_explained"].shape == (8, EXPERTS)
        assert tables["surrogate_bias"].shape == (EXPERTS, HIDDEN)
        assert tables["stream_energy"].shape == (1,) and tables["stream_energy"] > 0
        assert tables["surrogate_in"].shape == tables["surrogate_out"].shape
        assert tables["surrogate_in"].dtype == torch.bfloat16
        assert tables["surrogate_in"].shape[1] <= 8, layer
        sizes = {name: t.numel() * 2 for name, t in tables.items() if name in SERVED}
        report = next(r for r in reports if r.layer == layer)
        assert report.bytes == sum(sizes.values())
        assert report.share == report.bytes / (EXPERTS * 3 * HIDDEN * 32 * 4)
        shares = [report.mean, *report.by_rank.values()]
        assert shares == sorted(shares) and report.stored >= report.mean


def test_without_the_flag_a_profile_has_none(model: Path, profile: Path) -> None:
    job = job_with(model, profile.with_name("plain"), None)
    calibrate(dataclasses.replace(job, spec=CollectionSpec(memory=1 << 24)))
    plain, with_them = load_profile(job.out), load_profile(profile)
    assert plain.metadata.format_version == "1.4"
    assert all(candidate.surrogates is False for candidate in plain.rule_errors)
    assert b"surrogate" not in job.out.read_bytes()
    assert b"expert_energy" not in job.out.read_bytes()
    assert surrogate_reports(plain) == []
    parameters = {**with_them.metadata.method_parameters}
    del parameters["surrogate_rank"]
    assert parameters == plain.metadata.method_parameters
    for layer, tables in plain.tables.items():
        # Their sums leave less memory for a block, so others are added up in another order.
        close = torch.allclose(plain.similarity[layer], with_them.similarity[layer], atol=1e-6)
        assert close and tables.keys() <= with_them.tables[layer].keys()


@pytest.mark.parametrize("stops", ["after every sequence", "killed while saving all the time"])
def test_a_resumed_calibration_gives_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: str
) -> None:
    straight = job_with(model, tmp_path / "straight.out", None, num_tokens=TOKENS)
    calibrate(straight)
    cut = dataclasses.replace(straight, out=tmp_path / "cut.out")
    runs = 0
    while not cut.out.exists():
        job = dataclasses.replace(cut, resume=runs > 0)
        runs += 1
        if stops.startswith("killed"):
            monkeypatch.setattr(layer_by_layer, "SAVE_EVERY_S", -1.0)
            left = [4]

            def progress(_done: int, total: int, _what: str, left: list[int] = left) -> None:
                left[0] -= total > 0
                if left[0] == 0:
                    raise KeyboardInterrupt

            with suppress(KeyboardInterrupt):
                calibrate(job, progress=progress)
        else:
            with suppress(Interrupted):
                calibrate(job, stop=lambda: True)
    assert runs > (3 if stops.startswith("killed") else LAYERS * 4)
    assert cut.out.read_bytes() == straight.out.read_bytes()


def test_calibrate_says_what_they_explain_and_inspect_shows_it(
    model: Path, tmp_path: Path, profile: Path
) -> None:
    out, picture = tmp_path / "p.safetensors", tmp_path / "p.png"
    flags = [f"--model={model}", f"--out={out}", "--tokens=1200", "--length=64", "--device=cpu"]
    code, output = run("calibrate", *flags, "--layer-by-layer", "--surrogate-rank=auto")
    assert code == 0, output
    for layer in moe_layer_ids(MODEL):
        assert f"layer {layer}: surrogates of rank " in output and "best other expert" in output
    code, output = run("inspect", str(profile), "--plot", str(picture))
    assert code == 0, output
    assert "other   mean      4      8     16     32     64" in output and "fell back" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    facts = json.loads(run("inspect", str(profile), "--json")[1])
    assert [row["layer"] for row in facts["surrogates"]] == moe_layer_ids(MODEL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--surrogate-rank=0"], "--surrogate-rank 0: give a rank from 1 to the model's hidden"),
        (["--surrogate-rank=-3"], "--surrogate-rank -3: give a rank from 1"),
        (["--surrogate-rank=many"], "--surrogate-rank many: give a rank from 1"),
        (["--surrogate-rank=2.5"], "--surrogate-rank 2.5: give a rank from 1"),
        (["--surrogate-rank=65"], "--surrogate-rank 65 is above the model's hidden size 64"),
        (
            ["--surrogate-rank=auto", "--layer-by-layer", "--tokens=255", "--length=64"],
            "give at least 256, or a smaller --length",
        ),
        (
            ["--surrogate-rank=8", "--layer-by-layer", "--memory=1MiB"],
            "--memory 1MiB is too little for --surrogate-rank 8, whose sums take 1MiB",
        ),
    ],
)
def test_a_wrong_rank_is_refused_in_one_line(
    model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, output = run(
        "calibrate", f"--model={model}", f"--out={tmp_path / 'p'}", "--device=cpu", *arguments
    )
    assert code == 2 and "Traceback" not in output
    assert output.count("sere-sglang: error: ") == 1 and message in output, output


def test_memory_is_that_of_all_layers_whose_sums_are_held() -> None:
    asked = CollectionSpec(memory=1 << 30, surrogates=SurrogateSpec(16, 512))
    with pytest.raises(SereError, match=r"48 layer\(s\).*--layer-by-layer, which holds") as error:
        block_tokens(asked, 64, 1024, 256, layers=48)
    enough = int(str(error.value).split("at least --memory ")[1].split("MiB")[0])
    assert enough > 48 * 16 * 64
    assert block_tokens(dataclasses.replace(asked, memory=enough << 20), 64, 1024, 256, 48) >= 16


def test_ranks_stay_within_what_a_profile_may_hold() -> None:
    assert evaluated_ranks(SurrogateSpec(None, 512), 128, 2048, 48) == (4, 8, 16, 32)
    assert evaluated_ranks(SurrogateSpec(20, 512), 128, 2048, 48) == (4, 8, 16, 20, 32)
    assert evaluated_ranks(SurrogateSpec(3, 512), 8, 6, 4) == (3, 4)
    with pytest.raises(SereError, match=r"more than 2 GiB; give at most 38"):
        evaluated_ranks(SurrogateSpec(64, 512), 128, 2048, 48)


def with_surrogates() -> SereProfile:
    """E = 4, H = 16, rank 3 in layer 0, none in layer 2."""
    profile = a_profile((0, 2))
    g = torch.Generator().manual_seed(0)
    for layer in (0, 2):
        profile.tables[layer] |= {
            "surrogate_bias": torch.randn(4, 16, generator=g).bfloat16(),
            "surrogate_ranks": torch.tensor([2, 4]),
            "surrogate_explained": torch.rand(5, 4, generator=g),
            "expert_energy": torch.rand(4, generator=g),
            "expert_bytes": torch.full((4,), 96),
        }
    for name in ("surrogate_in", "surrogate_out"):
        profile.tables[0][name] = torch.randn(4, 3, 16, generator=g).bfloat16()
    return profile


def test_a_layer_may_have_biases_alone(tmp_path: Path) -> None:
    save_profile(with_surrogates(), tmp_path / "p")
    loaded = load_profile(tmp_path / "p")
    assert [r.rank for r in surrogate_reports(loaded)] == [3, 0]
    assert loaded.tables[0]["surrogate_in"].equal(with_surrogates().tables[0]["surrogate_in"])


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        *((name, "nan", "holds NaN") for name in FLOATS),
        *((name, "inf", "holds infinity") for name in FLOATS),
        *((name, "short", "has shape") for name in SURROGATE_CHECKS if "ranks" not in name),
        *((name, "gone", "has surrogates but no") for name in SURROGATE_CHECKS),
        *((name, "double", "expected") for name in SURROGATE_CHECKS),
        ("surrogate_in", "narrow", "hidden size 16"),
        ("surrogate_bias", "narrow", "hidden size 16"),
        ("surrogate_ranks", "17", "of rank 17, above its hidden size 16"),
        ("surrogate_ranks", "1", "is not ascending"),
        ("surrogate_ranks", "0", "outside [1, "),
        ("surrogate_explained", "1.5", "outside ["),
        ("expert_energy", "-1", "outside [0, "),
        ("expert_bytes", "0", "outside [1, "),
    ],
)  # fmt: skip
def test_an_impossible_table_is_refused_by_name(
    tmp_path: Path, name: str, change: str, said: str
) -> None:
    profile, path = with_surrogates(), tmp_path / "p"
    table = profile.tables[0].pop(name)
    if change == "short":
        profile.tables[0][name] = table[:, :-1] if name in SERVED[:2] else table[:-1]
    elif change == "narrow":
        profile.tables[0][name] = table[..., :-1]
    elif change == "double":
        profile.tables[0][name] = table.double()
    elif change != "gone":
        table.view(-1)[1] = float(change) if table.is_floating_point() else int(change)
        profile.tables[0][name] = table
    save_profile(profile, path)
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    assert f"{path}: layers.0" in str(error.value) and "calibrate again" in str(error.value)
    blamed = "surrogate_out" if (name, change) == ("surrogate_in", "short") else name
    assert blamed in str(error.value) or change == "17"
    assert said in str(error.value)
