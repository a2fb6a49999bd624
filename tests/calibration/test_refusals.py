"""What a calibration refuses or runs into: one line each, with the flag or file and the fix."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sere_sglang.calibration as calibration
from sere_sglang.calibration import calibrate, layer_by_layer
from sere_sglang.calibration import collector as worker
from sere_sglang.calibration.collection import CollectionSpec
from sere_sglang.calibration.decoder import BlockExperts
from sere_sglang.calibration.hidden import _reserve
from sere_sglang.calibration.job import _differences, read_text, readable
from sere_sglang.calibration.through_sglang import _require_experts_in_place
from sere_sglang.cli.main import app
from sere_sglang.errors import SereError
from sere_sglang.profile import SereProfile, load_profile
from tests.calibration.layer_jobs import a_job, same_everywhere, write_float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    write_float32("qwen3_moe", folder / "qwen3_moe")
    return folder


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    same_everywhere(monkeypatch)


class _Format(enum.Enum):
    STANDARD = 0
    BYPASSED = 1


class _Layer(torch.nn.Module):
    """As much of SGLang's MoE layer as a collector looks at."""

    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.layer_id, self.num_experts, self.num_fused_shared_experts = layer_id, 4, 0
        self.hidden_size = 8
        self.moe_runner_config = SimpleNamespace(intermediate_size_per_partition=8)
        self.reduce_results = True


def _router(output_format: _Format = _Format.STANDARD) -> Any:
    runner = SimpleNamespace(value="flashinfer_trtllm")
    return SimpleNamespace(
        topk_config=SimpleNamespace(
            output_format=output_format,
            runner_backend=runner,
            custom_routing_function=None,
            scoring_func="softmax",
        )
    )


def _attached(
    monkeypatch: pytest.MonkeyPatch, found: list[int], routers: dict[int, Any]
) -> worker.Collector:
    topk = SimpleNamespace(TopKOutputFormat=_Format)
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.moe.topk", topk)
    monkeypatch.setattr(worker, "moe_layers", lambda _: {i: _Layer(i) for i in found})
    monkeypatch.setattr(worker, "routers_of", lambda _: routers)
    collector = worker.Collector(CollectionSpec(memory=1 << 20))
    collector.attach(torch.nn.Identity())
    return collector


@pytest.mark.parametrize(
    ("found", "routers", "message"),
    [
        ([], {}, "--model: Identity has no MoE layers, there is nothing to calibrate"),
        ([0, 1], {0: _router()}, r"--model: Identity routes inside its own code .* \[1\]"),
        (
            [0],
            {0: _router(_Format.BYPASSED)},
            r"--model: Identity runs --moe-runner-backend flashinfer_trtllm, which routes inside "
            r"its kernel \(bypassed\); choose another",
        ),
    ],
)
def test_a_model_that_sglang_cannot_show_us(
    monkeypatch: pytest.MonkeyPatch, found: list[int], routers: dict[int, Any], message: str
) -> None:
    collector = _attached(monkeypatch, found, routers)
    with pytest.raises(SereError, match=message):
        collector.call("begin")


def test_a_layer_that_never_passes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = _attached(monkeypatch, [0, 2], {0: _router(), 2: _router()})
    collector.call("begin")
    with pytest.raises(SereError, match=r"MoE layer\(s\) \[0, 2\] ran without SGLang's standard"):
        collector.call("check")


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda rows: torch.empty(1 << 50), r"out of memory .*; lower --memory \(now 1MiB\), or"),
        (lambda rows: torch.full((4, *rows.shape), torch.nan), "infinite or NaN .* --dtype bfloat"),
    ],
)
def test_what_happens_inside_the_engine_comes_back(
    monkeypatch: pytest.MonkeyPatch, outputs: Any, message: str
) -> None:
    """A failure there is kept for the next call, the scheduler would die of it."""
    collector = _attached(monkeypatch, [0], {0: _router()})
    collector.call("begin")
    monkeypatch.setattr(worker.LayerExperts, "outputs", lambda _, rows: outputs(rows))
    collector.begin_forward(5000, is_prefill=True)
    slots = SimpleNamespace(
        topk_ids=torch.zeros(5000, 2, dtype=torch.int32),
        topk_weights=torch.ones(5000, 2),
        router_logits=torch.zeros(5000, 4),
    )
    layer = next(iter(collector._modules.values()))
    collector.collect(layer, torch.zeros(5000, 8), slots)
    with pytest.raises(SereError, match=message):
        collector.call("check")


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
    monkeypatch.setattr(layer_by_layer, "SAVE_EVERY_S", -1.0)
    job = a_job(folder / "qwen3_moe", tmp_path / "p.out", spec=CollectionSpec(memory=1 << 24))
    with _at_most(room), pytest.raises(SereError, match=message) as error:
        calibrate(job)
    assert "free some space" in str(error.value)
    assert not job.out.exists() and not list(tmp_path.glob("*.writing"))


def test_a_full_disk_at_the_end_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_tokenizer_without_files_is_told_so(folder: Path, tmp_path: Path) -> None:
    job = a_job(folder / "qwen3_moe", tmp_path / "p.out")
    with pytest.raises(SereError, match="its tokenizer makes nothing of text"):
        read_text(job, SimpleNamespace(encode=lambda _: []))


@pytest.mark.parametrize(
    ("flag", "given"),
    [
        ("--enable-eplb", {"enable_eplb": True}),
        ("--ep-num-redundant-experts", {"ep_num_redundant_experts": 2}),
        ("--init-expert-location", {"init_expert_location": "moved.json"}),
    ],
)
def test_experts_that_are_not_in_their_places(flag: str, given: dict[str, Any]) -> None:
    trivial = {"ep_num_redundant_experts": 0, "init_expert_location": "trivial"}
    record = SimpleNamespace(**{"enable_eplb": False, **trivial, **given})
    with pytest.raises(SereError, match=f"at its own place; drop {flag}, which a server may have"):
        _require_experts_in_place(record)


def test_an_unreadable_model_is_one_error_and_a_refusal_keeps_its_words() -> None:
    one_line = r"^--model m: SGLang cannot read it \(torn\); give"
    with pytest.raises(SereError, match=one_line), readable("m"):
        raise OSError("torn\nin two")
    with pytest.raises(SereError, match=r"^drop --tp$"), readable("m"):
        raise SereError("drop --tp")


def test_resuming_another_calibration_names_the_flags_that_differ() -> None:
    now = {"model": "a", "text": "1", "spec": {"memory": 2, "measures": ["frobenius"]}}
    kept = {
        "model": "a",
        "text": "2",
        "spec": {"memory": 1, "measures": ["frobenius"], "surrogates": {"rank": 4}},
    }
    named = ["--data (or what is taken of it)", "--memory", "--surrogate-rank"]
    assert list(_differences(now, kept)) == named
    assert list(_differences(now, now)) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"is a folder; name the file"),
        ("pipe", r"is no regular file; name the file to write"),
        ("link", r"is no regular file; name the file to write"),
        ("x" * 300, r"File name too long; choose another place or name"),
        ("x" * 245, r"File name too long; choose another place or name"),
        ("new/" + "x" * 245, r"File name too long; choose another place or name"),
        ("a\0b", r"embedded null byte; choose another place or name"),
    ],
)
def test_an_out_that_cannot_be_written_is_refused_first(
    folder: Path, tmp_path: Path, name: str, message: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(SereError, match=rf"^--out .*{message}"):
        calibrate(a_job(folder / "qwen3_moe", tmp_path / name))
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} <= {"pipe", "link", "new"}


@pytest.mark.parametrize("out", ["", "."])
@pytest.mark.parametrize("missing", ["--if-missing", "--resume"])
def test_the_current_folder_is_no_name(out: str, missing: str) -> None:
    with pytest.raises(SereError, match=r"--out \. is a folder"):
        app(["calibrate", "--model=m", f"--out={out}", missing], standalone_mode=False)


def test_a_gpu_that_is_not_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SereError, match=r"^--device cuda: torch finds no GPU here; give --device"):
        calibrate(a_job(folder / "qwen3_moe", tmp_path / "p.out", device="cuda"))


@pytest.mark.parametrize("flag", ["--tokens", "--surrogate-rank", "--memory"])
@pytest.mark.parametrize("value", ["9" * 5000, "٣", "²"])
def test_a_number_is_of_plain_digits_and_not_endless(flag: str, value: str) -> None:
    with pytest.raises(SereError, match=f"^{flag} ") as error:
        app(["calibrate", "--model=m", "--out=p", flag, value], standalone_mode=False)
    assert len(str(error.value)) < 200


def test_a_space_that_cannot_be_reserved_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(SereError, match=r"cannot reserve 0 MiB .*File name too long"):
        _reserve(tmp_path / ("x" * 300), 64)
