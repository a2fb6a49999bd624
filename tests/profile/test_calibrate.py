"""Real calibrations through SGLang's engine, against the expert outputs computed with torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sere_sglang.config import SereConfig
from sere_sglang.preflight import prepare
from sere_sglang.profile import MoeModelInfo, check_profile_fits, load_profile
from sere_sglang.profile.collection import MEASURES
from tests.profile import definitions
from tests.server.checkpoints import EXPERTS, TOP_K, moe_layer_ids, write_checkpoint

ARCHITECTURES = ("qwen3_moe", "deepseek_v2")
TOKENS, CKA_TOKENS = 600, 400
COMMAND = str(Path(sys.executable).with_name("sere-sglang"))
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "SOURCE_DATE_EPOCH": "1700000000",
    "PYTHONPATH": str(Path(__file__).parents[2]),
}


@dataclass
class Run:
    """A finished calibration: the model, its profile, and the rows each MoE layer was given."""

    architecture: str
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
    """Every architecture at once: most of a run is SGLang starting."""
    children = {}
    for name in ARCHITECTURES:
        paths = [
            folder / name,
            folder / "text.txt",
            folder / f"{name}.out",
            folder / f"{name}.kept",
        ]
        command = [sys.executable, "-m", "tests.profile.calibration_run", *map(str, paths)]
        children[name] = _start([*command, *MEASURES], folder / f"{name}.log")
    out, log = folder / "resumed.safetensors", folder / "interrupted.log"
    interrupted = [sys.executable, "-m", "tests.profile.interrupted_run", "256"]
    children["interrupted"] = _start([*interrupted, *_arguments(folder, out)], log)
    finished = {}
    try:
        for name, child in children.items():
            expected = 130 if name == "interrupted" else 0
            assert child.wait(timeout=400) == expected, _tail(folder / f"{name}.log")
            if name == "interrupted":
                continue
            kept = load_file(folder / f"{name}.kept")
            layers = moe_layer_ids(name)
            finished[name] = Run(
                architecture=name,
                model=folder / name,
                profile=folder / f"{name}.out",
                rows={i: kept[f"{i}/pending"] for i in layers},
                routed={i: kept[f"{i}/pending_routed"] for i in layers},
            )
        yield finished
    finally:
        for child in children.values():
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
        matrices = {m: tables.get(f"similarity_{m.replace('-', '_')}") for m in MEASURES}
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
        best = F.linear(rows.float(), gate.float()).topk(TOP_K).indices
        expected = torch.zeros(len(rows), EXPERTS, dtype=torch.bool).scatter_(1, best, True)
        agreeing = (expected & run.routed[layer]).sum() / expected.sum()
        assert agreeing > 0.98  # bfloat16 logits may order two equal ones differently


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_server_takes_the_profile(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    model = MoeModelInfo.from_folder(run.model)
    profile = load_profile(run.profile)
    check_profile_fits(profile, model, run.profile)
    asked = SereConfig(moe_backend="sere", sere_profile=str(run.profile)).check()
    hf_config = json.loads((run.model / "config.json").read_text())
    assert prepare(str(run.model), hf_config, asked).enabled
    meta = profile.metadata
    assert meta.method == "frobenius" and meta.num_tokens == TOKENS
    assert meta.architecture == model.architecture and meta.date == "2023-11-14"
    assert meta.data.endswith("text.txt") and meta.method_parameters["weighting"] == "all"


def test_interrupted_and_resumed_is_the_same_to_the_byte(
    runs: dict[str, Run], folder: Path
) -> None:
    out, log = folder / "resumed.safetensors", folder / "interrupted.log"
    assert "--resume" in log.read_text()
    assert not out.exists()

    command = [COMMAND, *_arguments(folder, out)]
    refused = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert refused.returncode == 2 and "--resume" in refused.stderr

    log = folder / "resumed.log"
    child = _start([*command, "--resume"], log)
    try:
        assert child.wait(timeout=300) == 0, _tail(log)
    finally:
        _end(child)
    assert out.read_bytes() == runs["qwen3_moe"].profile.read_bytes()
    assert not out.with_name(out.name + ".partial").exists()


def _arguments(folder: Path, out: Path) -> list[str]:
    """The calibration of `calibration_run` on the command line."""
    text = f"calibrate --data {folder}/text.txt --tokens {TOKENS} --length 128 --device cpu"
    measures = f"--measure all --cka-tokens {CKA_TOKENS}"
    return [*text.split(), *measures.split(), f"--model={folder}/qwen3_moe", f"--out={out}"]


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


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("w") as out:
        return subprocess.Popen(
            command,
            env=ENVIRONMENT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if "server_args=" not in line]
    return "\n".join(lines[-30:])
