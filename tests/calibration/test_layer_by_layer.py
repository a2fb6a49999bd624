"""Calibration with one layer in memory, against transformers' whole model and SGLang's profile."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sere_sglang.calibration import CalibrationJob, Interrupted, calibrate, layer_by_layer
from sere_sglang.calibration.collection import MEASURES, CollectionSpec
from sere_sglang.calibration.decoder import Decoder
from sere_sglang.errors import SereError
from sere_sglang.profile import load_profile
from sere_sglang.profile.report import matrices_of
from tests.calibration import definitions
from tests.calibration.layer_jobs import (
    CKA_TOKENS,
    LENGTH,
    TOKENS,
    a_job,
    same_everywhere,
    write_float32,
)
from tests.server.checkpoints import (
    EXPERTS,
    LAYERS,
    MOE_ARCHITECTURES,
    TOP_K,
    moe_layer_ids,
)
from tests.server.harness import Forked

DEMO = Path(__file__).parents[2] / "demo_model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    for architecture in MOE_ARCHITECTURES:
        write_float32(architecture, folder / architecture)
    return folder


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    same_everywhere(monkeypatch)


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
    original = layer_by_layer.read_text

    def read(job: CalibrationJob, tokenizer: Any) -> Any:
        text = original(job, tokenizer)
        windows.extend(text.windows)
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_by_layer, "read_text", read)
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
    """A trained model, whose routers are sure of what they choose."""
    command = [sys.executable, "-m", "sere_sglang.cli.main", "calibrate", f"--model={DEMO}"]
    command += [f"--data={DEMO}/data/calibration.txt", "--tokens=4096", "--device=cpu"]
    command += [f"--out={tmp_path}/theirs.safetensors"]
    through_sglang = Forked.start(command, {"PYTHONWARNINGS": "ignore"}, tmp_path / "log")
    assert through_sglang.wait(timeout=1200) == 0, (tmp_path / "log").read_text()
    theirs = load_profile(tmp_path / "theirs.safetensors")
    told = theirs.metadata
    job = CalibrationJob(
        model=str(DEMO),
        out=tmp_path / "ours.safetensors",
        spec=CollectionSpec(),
        data=(DEMO / "data" / "calibration.txt",),
        num_tokens=4096,
        length=told.method_parameters["length"],
        seed=told.method_parameters["seed"],
        device="cpu",
        layer_by_layer=True,
    )
    ours = calibrate(job)
    assert ours.similarity.keys() == theirs.similarity.keys()
    for layer, matrix in ours.similarity.items():
        assert (matrix - theirs.similarity[layer]).abs().max() < 5e-3, layer
        counts = ours.tables[layer]["popularity"], theirs.tables[layer]["popularity"]
        moved = (counts[0] - counts[1]).abs().sum() / counts[1].sum()
        assert moved < 5e-3  # bfloat16: two nearly equal router logits change places
    same = {"model", "data", "date", "method_parameters"}
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
            monkeypatch.setattr(layer_by_layer, "SAVE_EVERY_S", -1.0)
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
    original = layer_by_layer.Decoder._load

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


FAMILIES = ("deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "minimax_m2", "phimoe")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_gives_what_it_gives_in_the_whole_model(family: str, tmp_path: Path) -> None:
    """Bit for bit, of checkpoints that transformers itself wrote."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16}
    shape |= {"num_key_value_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 32}
    shape |= {"vocab_size": 300, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    shape |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 8)
    shape |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    if family == "deepseek_v3":
        shape |= {"head_dim": 8, "kv_lora_rank": 32, "q_lora_rank": 24, "v_head_dim": 16}
        shape |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "first_k_dense_replace": 1}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(
        tmp_path
    )
    ids = list(range(5, 45))
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
        states = whole(torch.tensor([ids]), output_hidden_states=True).hidden_states
    decoder = Decoder(str(tmp_path), "cpu")
    with decoder.embedding() as embed:
        hidden = embed(ids)
    looked = 0
    for index in range(2):
        with decoder.layer(index) as block:
            hidden = block(hidden)
            if block.experts is None:
                continue
            looked += 1
            assert block.seen is not None
            rows, chosen, weights = block.seen
            outputs = block.experts.outputs(rows)  # [E, n, H]
            picked = outputs[chosen, torch.arange(len(rows))[:, None]]  # [n, K, H]
            mixed = (picked * weights[:, :, None]).sum(1)
            torch.testing.assert_close(mixed, block.experts.module(rows, chosen, weights))
        assert torch.equal(hidden, states[index + 1][0])
    assert looked
