"""Real calibrations through SGLang's engine, against the expert outputs computed with torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sere_sglang.calibration.collection import MEASURES
from sere_sglang.config_check import checked
from sere_sglang.measure.server import Process
from sere_sglang.options import SereConfig
from sere_sglang.preflight import prepare
from sere_sglang.profile import MoeModelInfo, check_profile_fits, load_profile
from tests.calibration import definitions
from tests.server.checkpoints import EXPERTS, TOP_K, moe_layer_ids, write_checkpoint
from tests.server.harness import Forked

ARCHITECTURES = ("qwen3_moe", "deepseek_v2")
TOKENS, CKA_TOKENS = 600, 400
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "SOURCE_DATE_EPOCH": "1700000000",
}


@dataclass
class Run:
    """A finished calibration: the model, its profile, and the rows each MoE layer was given."""

    model: Path
    profile: Path
    rows: dict[int, torch.Tensor]  # layer -> [T, H]
    routed: dict[int, torch.Tensor]  # layer -> bool [T, E]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    words = [f"{a}{b} " for a in "bcdfgklmnprstvz" for b in ("at", "in", "ou", "ery")]
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(words), (4000,), generator=generator).tolist()
    (folder / "text.txt").write_text("".join(words[i] for i in picked))
    for architecture in ARCHITECTURES:
        write_checkpoint(architecture, folder / architecture)
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Iterator[dict[str, Run]]:
    """Both in one go, and deepseek_v2 interrupted and resumed; most of it is SGLang starting."""
    children = [_start(folder, "qwen3_moe", "qwen3_moe.log")]
    try:
        children.append(_start(folder, "deepseek_v2", "interrupted.log", interrupt_at=256))
        assert children[1].wait(timeout=6000) == 130, _tail(folder / "interrupted.log")
        assert not (folder / "deepseek_v2.out").exists()
        children.append(_start(folder, "deepseek_v2", "deepseek_v2.log", "--resume"))
        assert children[0].wait(timeout=6000) == 0, _tail(folder / "qwen3_moe.log")
        children.append(_start(folder, "deepseek_v2", "straight.log", out="straight.out"))
        finished = {}
        for name, child in zip(("deepseek_v2", "straight"), children[2:], strict=True):
            assert child.wait(timeout=6000) == 0, _tail(folder / f"{name}.log")
        for name in ARCHITECTURES:
            kept = load_file(folder / f"{name}.kept")
            layers = moe_layer_ids(name)
            finished[name] = Run(
                model=folder / name,
                profile=folder / f"{name}.out",
                rows={i: kept[f"{i}/pending"] for i in layers},
                routed={i: kept[f"{i}/pending_routed"] for i in layers},
            )
        yield finished
    finally:
        for child in children:
            _end(child)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_similarities_are_those_of_the_experts_outputs(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    profile = load_profile(run.profile)
    weights = load_file(run.model / "model.safetensors")
    assert sorted(profile.similarity) == moe_layer_ids(name)
    for layer, rows in run.rows.items():
        assert rows.shape[0] == TOKENS
        outputs = _expert_outputs(weights, layer, rows)
        tables = profile.tables[layer]
        matrices: dict[str, Any] = {
            m: tables.get(f"similarity_{m.replace('-', '_')}") for m in MEASURES
        }
        matrices["frobenius"] = profile.similarity[layer]
        for measure, matrix in matrices.items():
            used = outputs[:, :CKA_TOKENS] if measure.startswith("cka") else outputs
            expected = definitions.BY_NAME[measure](used)
            # The runner rounds its output to bfloat16, the definition here does not.
            np.testing.assert_allclose(matrix, expected, atol=2e-3, err_msg=f"{layer} {measure}")
        np.testing.assert_allclose(tables["scale"], definitions.scale(outputs), atol=3e-3)
        sent = run.routed[layer].numpy().astype(int)
        assert (sent.sum(1) == TOP_K).all()
        assert np.array_equal(tables["coactivation"], sent.T @ sent)
        assert np.array_equal(tables["popularity"], sent.sum(0))
        assert np.array_equal(tables["popularity_by_rank"].sum(0), sent.sum(0))
        assert (tables["popularity_by_rank"].sum(1) == TOKENS).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_router_chose_for_the_rows_we_saw(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    weights = load_file(run.model / "model.safetensors")
    for layer, rows in run.rows.items():
        gate = weights[f"model.layers.{layer}.mlp.gate.weight"]
        chosen, best = F.linear(rows.float(), gate.float()).softmax(-1).topk(TOP_K)
        expected = torch.zeros(len(rows), EXPERTS, dtype=torch.bool).scatter_(1, best, True)
        agreeing = (expected & run.routed[layer]).sum() / expected.sum()
        assert agreeing > 0.98  # bfloat16 logits may order two equal ones differently
        if name == "qwen3_moe":  # norm_topk_prob
            chosen = chosen / chosen.sum(dim=1, keepdim=True)
        counted = load_profile(run.profile).tables[layer]["weight_by_rank"]
        np.testing.assert_allclose(counted, chosen.square().mean(dim=0).sqrt(), rtol=0.02)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_server_takes_the_profile(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    model = MoeModelInfo.from_folder(run.model)
    profile = load_profile(run.profile)
    check_profile_fits(profile, model, run.profile)
    asked = checked(SereConfig(moe_backend="sere", sere_profile=str(run.profile)))
    hf_config = json.loads((run.model / "config.json").read_text())
    assert prepare(str(run.model), hf_config, asked).enabled
    meta = profile.metadata
    assert meta.method == "frobenius" and meta.num_tokens == TOKENS
    assert meta.architecture == model.architecture and meta.date == "2023-11-14"
    assert meta.data.endswith("text.txt") and meta.method_parameters["weighting"] == "all"


def test_ctrl_c_says_how_to_resume_and_leaves_nothing_behind(
    runs: dict[str, Run], folder: Path
) -> None:
    log = (folder / "interrupted.log").read_text()
    assert "Stopped. What is done is in" in log and "--resume" in log
    assert "Traceback" not in log
    assert not list(folder.glob("*.partial"))
    # Every token once: the second half follows the first in the rows of the resumed run.
    # (Sequences that begin with the same letter share their first row.)
    rows = runs["deepseek_v2"].rows[1]
    assert len(rows) == TOKENS and len(rows.unique(dim=0)) > TOKENS - 5


def test_resuming_gives_the_bytes_of_an_uninterrupted_run(
    runs: dict[str, Run], folder: Path
) -> None:
    assert runs["deepseek_v2"].profile.read_bytes() == (folder / "straight.out").read_bytes()


def test_a_killed_worker_is_told_with_the_flags_that_help(folder: Path) -> None:
    """As by the system when memory runs out; here while the worker answers a call of ours."""
    child = _start(folder, "qwen3_moe", "killed.log", "--cka-tokens=600", out="killed.out")
    try:
        log = folder / "killed.log"
        deadline = time.monotonic() + 900
        while "running all experts" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        (worker,) = (p for p in psutil.Process(child.pid).children(recursive=True) if _schedules(p))
        worker.kill()
        assert child.wait(timeout=600) == 2, _tail(log)
    finally:
        _end(child)
    assert "sere-sglang: error: SGLang stopped while it ran" in log.read_text()
    assert "lower --memory (now 1024MiB) or --layer-by-layer" in log.read_text()
    assert "Traceback" not in log.read_text()


def _schedules(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # a compiler that has just ended
        return "scheduler" in process.name() or "scheduler" in " ".join(process.cmdline())
    return False


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layer_by_layer_agrees(runs: dict[str, Run], name: str, tmp_path: Path) -> None:
    """The same tokens through transformers' modules, both in bfloat16."""
    folder = runs[name].model.parent
    command = [*_command(folder, name, tmp_path / "p.out"), "--layer-by-layer"]
    command[2:5] = ["sere_sglang.cli.main"]
    log = tmp_path / "p.log"
    assert Forked.start(command, ENVIRONMENT, log).wait(timeout=600) == 0, _tail(log)
    ours, theirs = load_profile(tmp_path / "p.out"), load_profile(runs[name].profile)
    assert ours.similarity.keys() == theirs.similarity.keys()
    for layer, matrix in ours.similarity.items():
        np.testing.assert_allclose(matrix, theirs.similarity[layer], atol=2e-3)
        tables, others = ours.tables[layer], theirs.tables[layer]
        assert tables.keys() == others.keys()
        for measure in ("cosine", "residual"):
            name_of = f"similarity_{measure}"
            np.testing.assert_allclose(tables[name_of], others[name_of], atol=2e-3)
        np.testing.assert_allclose(tables["expert_energy"], others["expert_energy"], rtol=0.05)
        shares = tables["surrogate_explained"].mean(1), others["surrogate_explained"].mean(1)
        np.testing.assert_allclose(*shares, atol=0.02)
    told = [{**p.metadata.method_parameters} for p in (ours, theirs)]
    assert told[0].pop("layer_by_layer") is True
    assert told[0] == told[1]
    same = [replace(p.metadata, method_parameters={}) for p in (ours, theirs)]
    assert same[0] == same[1]


def _expert_outputs(weights: dict[str, torch.Tensor], layer: int, rows: torch.Tensor) -> np.ndarray:
    """[E, T, H] float64: silu(gate(x)) * up(x), down, as the checkpoint's own matrices say."""
    outputs = []
    for e in range(EXPERTS):
        prefix = f"model.layers.{layer}.mlp.experts.{e}"
        gate, up, down = (
            weights[f"{prefix}.{name}_proj.weight"].double() for name in ("gate", "up", "down")
        )
        x = rows.double()
        outputs.append(F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down))
    return torch.stack(outputs).numpy()


def _command(folder: Path, name: str, out: Path, *, interrupt_at: int = 0) -> list[str]:
    command = [sys.executable, "-m", "tests.calibration.calibration_run"]
    command += [f"{out.with_suffix('')}.kept", str(interrupt_at), "calibrate"]
    command += [f"--model={folder / name}", f"--out={out}"]
    command += [f"--data={folder}/text.txt", f"--tokens={TOKENS}", "--length=128", "--device=cpu"]
    return [*command, "--measure=all", f"--cka-tokens={CKA_TOKENS}", "--surrogate-rank=4"]


def _start(
    folder: Path, name: str, log: str, *extra: str, out: str = "", interrupt_at: int = 0
) -> Process:
    written = folder / (out or f"{name}.out")
    command = [*_command(folder, name, written, interrupt_at=interrupt_at), *extra]
    return Forked.start(command, ENVIRONMENT, folder / log)


def _end(child: Process) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if "server_args=" not in line]
    return "\n".join(lines[-30:])
