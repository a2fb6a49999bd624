"""Calibration with one layer in memory, against transformers' whole model and SGLang's profile."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sere_sglang.calibration import CalibrationJob, Interrupted, calibrate, layers
from sere_sglang.calibration.decoder import Decoder
from sere_sglang.errors import SereError
from sere_sglang.profile import SereProfile, load_profile
from sere_sglang.profile.collection import MEASURES, CollectionSpec
from sere_sglang.profile.report import matrices_of
from tests.profile import definitions
from tests.server.checkpoints import (
    EXPERTS,
    LAYERS,
    MOE_ARCHITECTURES,
    TOP_K,
    moe_layer_ids,
    write_checkpoint,
)

TOKENS, LENGTH, CKA_TOKENS = 300, 64, 200
DEMO = Path(__file__).parents[2] / "demo_model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    for architecture in MOE_ARCHITECTURES:
        config = write_checkpoint(architecture, folder / architecture) / "config.json"
        # Rounding to bfloat16 would hide small mistakes.
        config.write_text(config.read_text().replace("bfloat16", "float32"))
    return folder


@pytest.fixture(autouse=True)
def _same_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    # What choosing a CPU sets for SGLang's workers is not for the tests that follow.
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def a_job(model: Path, out: Path, **changes: Any) -> CalibrationJob:
    spec = CollectionSpec(measures=MEASURES, memory=1 << 21, cka_tokens=CKA_TOKENS)
    settings = {"num_tokens": TOKENS, "length": LENGTH, "device": "cpu", **changes}
    return CalibrationJob(
        model=str(model), out=out, **{"spec": spec, "layer_by_layer": True, **settings}
    )


class _Whole:
    """The model as transformers loads it, and what it gives to each layer's experts."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            model, attn_implementation="sdpa", experts_implementation="eager"
        )
        self.rows: dict[int, list[torch.Tensor]] = {}
        self.ids: dict[int, list[torch.Tensor]] = {}
        self.experts: dict[int, Any] = {}
        for index, layer in enumerate(self.model.model.layers):
            if hasattr(layer.mlp, "experts"):
                self.experts[index] = layer.mlp.experts
                layer.mlp.experts.register_forward_pre_hook(self._kept(index))

    def _kept(self, index: int) -> Any:
        def keep(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            self.rows.setdefault(index, []).append(args[0].clone())
            self.ids.setdefault(index, []).append(args[1].clone())

        return keep

    @torch.no_grad()
    def run(self, windows: list[list[int]]) -> None:
        for window in windows:
            self.model(torch.tensor([window]))

    def outputs(self, layer: int) -> np.ndarray:
        """[E, T, H] float64, by the checkpoint's matrices in the module's order."""
        x = torch.cat(self.rows[layer]).double()
        module = self.experts[layer]
        gate, up = module.gate_up_proj.detach().double().chunk(2, dim=1)
        inner = torch.nn.functional.silu(x @ gate.transpose(1, 2)) * (x @ up.transpose(1, 2))
        return (inner @ module.down_proj.detach().double().transpose(1, 2)).numpy()


@pytest.mark.parametrize("name", MOE_ARCHITECTURES)
def test_similarities_are_those_of_the_whole_models_experts(folder: Path, name: str) -> None:
    windows: list[list[int]] = []
    original = layers.read_text

    def read(job: CalibrationJob, tokenizer: Any) -> Any:
        text = original(job, tokenizer)
        windows.extend(text.windows)
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "read_text", read)
        calibrate(a_job(folder / name, folder / f"{name}.out"))
    whole = _Whole(folder / name)
    whole.run(windows)
    profile = load_profile(folder / f"{name}.out")
    assert sorted(profile.similarity) == sorted(whole.rows) == moe_layer_ids(name)
    for layer in profile.similarity:
        outputs = whole.outputs(layer)
        assert outputs.shape[:2] == (EXPERTS, TOKENS)
        for measure in MEASURES:
            used = outputs[:, :CKA_TOKENS] if measure.startswith("cka") else outputs
            np.testing.assert_allclose(
                matrices_of(profile, measure)[layer],
                definitions.BY_NAME[measure](used),
                atol=1e-5,
                err_msg=f"{layer} {measure}",
            )
        # The same rows, bit for bit, or the router would not choose the same.
        ids = torch.cat(whole.ids[layer])
        sent = torch.zeros(TOKENS, EXPERTS, dtype=torch.int64).scatter_(1, ids, 1)
        assert (sent.sum(1) == TOP_K).all()
        assert torch.equal(profile.tables[layer]["coactivation"], sent.T @ sent)
    assert not list(folder.glob("*.partial*"))


def test_the_demo_model_agrees_with_its_calibration_through_sglang(tmp_path: Path) -> None:
    """On the tokens that the shipped profile was made of."""
    theirs = load_profile(DEMO / "sere_profile.safetensors")
    told = theirs.metadata
    job = CalibrationJob(
        model=str(DEMO),
        out=tmp_path / "p.safetensors",
        spec=CollectionSpec(),
        data=(DEMO / "data" / "calibration.txt",),
        num_tokens=told.num_tokens,
        length=told.method_parameters["length"],
        seed=told.method_parameters["seed"],
        device="cpu",
        layer_by_layer=True,
    )
    ours = calibrate(job)
    assert ours.similarity.keys() == theirs.similarity.keys()
    for layer, matrix in ours.similarity.items():
        assert (matrix - theirs.similarity[layer]).abs().max() < 2e-3, layer
        counts = ours.tables[layer]["popularity"], theirs.tables[layer]["popularity"]
        moved = (counts[0] - counts[1]).abs().sum() / counts[1].sum()
        assert moved < 5e-3  # bfloat16: two nearly equal router logits change places
    same = {"model", "data", "tool_version", "date", "method_parameters"}
    for field in {f.name for f in dataclasses.fields(told)} - same:
        assert getattr(ours.metadata, field) == getattr(told, field), field
    digest = ours.metadata.method_parameters["text_digest"]
    assert digest == told.method_parameters["text_digest"]


@pytest.mark.parametrize("stops", ["after every sequence", "killed while saving all the time"])
def test_a_resumed_calibration_gives_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: str
) -> None:
    model = folder / "deepseek_v2"
    straight = a_job(model, tmp_path / "straight.out")
    calibrate(straight)
    cut = a_job(model, tmp_path / "cut.out")
    runs = 0
    while not cut.out.exists():
        job = dataclasses.replace(cut, resume=runs > 0)
        runs += 1
        if stops.startswith("killed"):
            monkeypatch.setattr(layers, "SAVE_EVERY_S", -1.0)
            with _killed_after(4) as progress:
                calibrate(job, progress=progress)
        else:
            with suppress(Interrupted):
                calibrate(job, stop=lambda: True)
    windows = -(-TOKENS // LENGTH)
    assert runs > (3 if stops.startswith("killed") else LAYERS * windows - 1)
    assert cut.out.read_bytes() == straight.out.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.out", "straight.out"]


@contextmanager
def _killed_after(calls: int) -> Iterator[Any]:
    """A progress function that dies at its `calls`-th sequence, with nobody saving anything."""
    left = calls

    def progress(_done: int, total: int, _what: str) -> None:
        nonlocal left
        left -= total > 0
        if left == 0:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        yield progress


def test_resuming_without_the_hidden_states_says_what_to_delete(
    folder: Path, tmp_path: Path
) -> None:
    job = a_job(folder / "qwen3_moe", tmp_path / "p.out")
    with pytest.raises(Interrupted):
        calibrate(job, stop=lambda: True)
    job.hidden_files[0].unlink()
    with pytest.raises(SereError, match=r"hidden0 is missing .* start without --resume"):
        calibrate(dataclasses.replace(job, resume=True))


def test_each_tensor_is_read_once(folder: Path, tmp_path: Path) -> None:
    """From a checkpoint in shards, and never more than one layer's."""
    model = tmp_path / "sharded"
    shutil.copytree(folder / "olmoe", model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    parts = [dict(list(tensors.items())[n::3]) for n in range(3)]
    names = [f"model-{n}.safetensors" for n in range(3)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, model / name)
    index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    read: list[str] = []
    original = layers.Decoder._load

    def load(self: Decoder, path: str) -> None:
        loaded = [n for n, p in self.model.named_parameters() if not p.is_meta]
        assert not loaded, "another layer still has its weights"
        read.append(path)
        original(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_load", load)
        ours = calibrate(a_job(model, tmp_path / "p.out"))
    assert read == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(LAYERS))]
    whole = load_profile(_profile_of(folder, "olmoe"))
    assert all(torch.equal(ours.similarity[i], whole.similarity[i]) for i in range(LAYERS))


def _profile_of(folder: Path, name: str) -> Path:
    out = folder / f"{name}.out"
    if not out.exists():
        calibrate(a_job(folder / name, out))
    return out


def _changed(folder: Path, to: Path, **config: Any) -> Path:
    shutil.copytree(folder / "qwen3_moe", to)
    told = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**told, **config}))
    return to


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "none_such"}, "transformers cannot build .*none_such"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized"),
        ({"mlp_only_layers": [1]}, "does not give model.layers.1 its weights"),
        ({"num_hidden_layers": 4}, "does not give model.layers.3 its weights"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(
    folder: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    model = _changed(folder, tmp_path / "model", **config)
    with pytest.raises(SereError, match=message) as error:
        calibrate(a_job(model, tmp_path / "p.out"))
    assert "drop --layer-by-layer" in str(error.value)


def test_flags_that_do_not_go_together(folder: Path, tmp_path: Path) -> None:
    job = a_job(folder / "qwen3_moe", tmp_path / "p.out", server_args=("--tp", "2"))
    with pytest.raises(SereError, match=r"'-- --tp 2' is for; drop one of the two"):
        calibrate(job)
    with pytest.raises(SereError, match="reads a model folder, --model some/hub-id is none"):
        calibrate(dataclasses.replace(job, model="some/hub-id", server_args=()))


def test_too_small_a_memory_is_refused_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    job = a_job(folder / "qwen3_moe", tmp_path / "p.out", spec=CollectionSpec(memory=1 << 14))
    with pytest.raises(SereError, match=r"at least --memory \d+MiB"):
        calibrate(job)


def test_out_of_memory_names_the_flag(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sere_sglang.calibration.decoder import BlockExperts

    def outputs(_self: Any, _rows: torch.Tensor) -> torch.Tensor:
        return torch.empty(1 << 50)  # DefaultCPUAllocator: can't allocate memory

    monkeypatch.setattr(BlockExperts, "outputs", outputs)
    with pytest.raises(SereError, match=r"out of memory .* lower --memory \(now 2MiB\)"):
        calibrate(a_job(folder / "qwen3_moe", tmp_path / "p.out"))


@pytest.mark.parametrize(
    ("room", "message"),
    [(20_000, "cannot reserve 0 MiB for the hidden"), (80_000, "partial: cannot be written")],
)
def test_a_full_disk_is_told_with_the_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, message: str
) -> None:
    """As with a quota: no file may grow beyond `room` bytes."""
    monkeypatch.setattr(layers, "SAVE_EVERY_S", -1.0)
    job = a_job(folder / "qwen3_moe", tmp_path / "p.out", spec=CollectionSpec(memory=1 << 24))
    with _at_most(room), pytest.raises(SereError, match=message) as error:
        calibrate(job)
    assert "free some space" in str(error.value)
    assert not job.out.exists() and not list(tmp_path.glob("*.writing"))


def test_a_full_disk_at_the_end_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sere_sglang.calibration as calibration

    job = a_job(folder / "qwen3_moe", tmp_path / "p.out")
    original = calibration.save_profile

    def full(profile: SereProfile, path: Path) -> None:
        with _at_most(1000):
            original(profile, path)

    monkeypatch.setattr(calibration, "save_profile", full)
    with pytest.raises(SereError, match=r"--out .* free some space .* --resume"):
        calibrate(job)
    assert not job.out.exists()
    monkeypatch.undo()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    calibrate(dataclasses.replace(job, resume=True))
    assert load_profile(job.out).similarity.keys() == {0, 1, 2}


@contextmanager
def _at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
