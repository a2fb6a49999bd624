"""The ways in: Engine keywords, launch_server, --config; and the ways out when SERE cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sere_sglang.errors import SereError
from sere_sglang.measure.server import live_state
from sere_sglang.profile import load_profile, save_profile
from tests.server.checks import PROMPTS
from tests.server.harness import SERE, TWO_RANKS, Server, refusal_of, run, serve
from tests.server.profiles import random_profile, without_profile

Checkpoint = Callable[[str], Path]
HERE = Path(__file__).parent
OWN_ROUTER = {
    "SGLANG_EXTERNAL_MODEL_PACKAGE": "own_router",
    "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
}


def _engine(**keywords: Any) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, str(HERE / "engine_script.py"), json.dumps(keywords)])


def _seen(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    lines = [line for line in result.stdout.splitlines() if line.startswith("SEEN ")]
    assert lines, result.stderr[-3000:]
    return json.loads(lines[0].removeprefix("SEEN "))


def test_engine_keywords(checkpoint: Checkpoint) -> None:
    model = str(checkpoint("qwen3_moe"))
    seen = _seen(_engine(model_path=model, moe_backend="sere", sere_primary_k=1))
    assert seen["tokens"] == [8] * 6
    assert seen["moe_backend"] == "sere"
    assert seen["sere"]["primary_k"] == 1
    *ignored, another = seen["refused"]
    assert all(said and "custom_params" in said for said in ignored) and another is None
    for row in seen["sere"]["counters"].values():
        assert row["active_after"] < row["active_before"]


def test_engine_refuses_with_an_exception(checkpoint: Checkpoint) -> None:
    model = str(checkpoint("qwen3_moe"))
    result = _engine(model_path=model, moe_backend="sere", sere_primary_k=9)
    assert result.returncode != 0
    assert "SereError: --sere-primary-k 9" in result.stderr


def test_launch_server_module_with_config_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """``python -m sglang.launch_server``, the name in SGLang's own --moe-runner-backend."""
    config = tmp_path / "server.yaml"
    config.write_text("moe-runner-backend: sere\nsere-primary-k: 2\nsere-threshold: 0.25\n")
    launcher = [sys.executable, "-m", "sglang.launch_server"]
    model = checkpoint("qwen3_moe")
    with serve(model, tmp_path / "log", "--config", str(config), launcher=launcher) as server:
        _is_at(server, primary_k=2, threshold=0.25)


def test_auto_calibrates_before_it_serves(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bare = without_profile(checkpoint("qwen3_moe"), tmp_path / "bare")
    log = tmp_path / "log"
    with serve(bare, log, "--moe-backend=sere", "--sere-profile=auto") as server:
        state = server.sere()
        assert server.get("/server_info")["sere_rule"] == "auto"
        assert state["enabled"] and state["rule"] == state["auto_rule"]["rule"]
        assert "errs least on the profile's held-out text" in state["auto_rule"]["because"]
    profile = load_profile(bare / "sere_profile.safetensors")
    assert profile.metadata.num_tokens > 10_000
    assert all("surrogate_bias" in tables for tables in profile.tables.values())
    assert "has no profile yet; calibrating it, once, before serving" in log.read_text()
    assert not list(bare.glob("*.partial"))


def test_scale_multiplies_the_weights_of_moved_slots(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = checkpoint("qwen3_moe")
    profile = random_profile(model)
    seen = {}
    for factor in (1.0, 0.0):
        for layer, matrix in profile.similarity.items():
            profile.tables[layer] = {"scale": torch.full_like(matrix, factor)}
        save_profile(profile, path := tmp_path / f"{factor}.safetensors")
        flags = (*SERE, f"--sere-profile={path}", "--sere-scale")
        with serve(model, tmp_path / "log", *flags) as server:
            rerouted = server.generate(PROMPTS, 8)
            server.set_sere(enabled=False)
            exact = server.generate(PROMPTS, 8)
        seen[factor] = [a["meta_info"]["output_token_logprobs"] for a in (*rerouted, *exact)]
    assert seen[1.0][: len(PROMPTS)] != seen[0.0][: len(PROMPTS)]
    assert seen[1.0][len(PROMPTS) :] == seen[0.0][len(PROMPTS) :]


def test_scale_needs_its_tables(checkpoint: Checkpoint) -> None:
    model = checkpoint("qwen3_moe")
    result = refusal_of(f"--model-path={model}", *SERE, "--sere-scale")
    assert result.returncode == 2
    assert "--sere-scale: " in result.stderr and "--measure residual" in result.stderr


def test_config_file_that_sglang_would_ignore(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("moe-backend: sere\n")
    result = refusal_of(f"--model-path={checkpoint('qwen3_moe')}", f"--config={config}")
    assert result.returncode == 2
    assert f"written with a space: --config {config}" in result.stderr


def _is_at(server: Server, *, primary_k: int, threshold: float) -> None:
    state = server.sere()
    assert (state["primary_k"], state["threshold"]) == (primary_k, threshold)
    server.generate(["one", "two", "three"], 6)
    assert all(row["forwards"] > 0 for row in server.sere()["counters"].values())


def test_help_shows_the_flags() -> None:
    result = run([sys.executable, "-m", "sglang.launch_server", "--help"])
    assert result.returncode == 0, result.stderr[-3000:]
    shown = result.stdout
    for flag in (
        "--moe-backend",
        "--sere-profile",
        "--sere-policy",
        "--sere-primary-k",
        "--sere-threshold",
        "--sere-min-batch",
        "--sere-max-batch",
        "--sere-quality-budget",
        "--sere-tpot-slo-ms",
        "--sere-allow-quality",
        "--sere-trace",
        "--sere-on-error",
    ):
        assert flag in shown


def test_fallback_serves_without_sere_and_says_so(checkpoint: Checkpoint, tmp_path: Path) -> None:
    log = tmp_path / "log"
    flags = ("--moe-backend=sere", "--sere-on-error=fallback")
    with serve(checkpoint("dense"), log, *flags) as server:
        assert len(server.generate(["hello"], 4)[0]["output_ids"]) == 4
        info = server.get("/server_info")
        assert "sere" not in info["internal_states"][0]
        assert "dense model" in info["sere_fallback"], info["sere_fallback"]
        with pytest.raises(SereError, match="dense model"):
            live_state(server)
    told = [line for line in log.read_text().splitlines() if "Serving WITHOUT SERE" in line]
    assert len(told) == 1 and info["sere_fallback"] in told[0]


def test_fallback_where_only_the_loaded_model_shows_it(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Both ranks go without, and what they answer is plain SGLang's."""
    model = _renamed(checkpoint("qwen3_moe"), tmp_path / "model", "NoTopKForCausalLM")
    log = tmp_path / "log"
    flags = (*SERE, "--sere-on-error=fallback", "--tp-size=2")
    with serve(model, log, *flags, env=OWN_ROUTER | TWO_RANKS) as server:
        assert len(server.generate(["hello"], 4)[0]["output_ids"]) == 4
        info = server.get("/server_info")
        assert "sere" not in info["internal_states"][0]
        assert [key for key in info if key.startswith("sere_")] == ["sere_fallback"]
        assert "MoE layer(s) 0-2" in info["sere_fallback"]
        with pytest.raises(urllib.error.HTTPError) as refusal:
            server.set_sere(enabled=False)
        assert refusal.value.code == 400
    told = [line for line in log.read_text().splitlines() if "Serving WITHOUT SERE" in line]
    assert len(told) == 1 and info["sere_fallback"] in told[0]


def test_fallback_where_only_the_first_forward_shows_it(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = _renamed(checkpoint("qwen3_moe"), tmp_path / "model", "UnusedTopKForCausalLM")
    flags = (*SERE, "--sere-on-error=fallback")
    with serve(model, tmp_path / "log", *flags, env=OWN_ROUTER) as server:
        for _ in range(2):
            assert len(server.generate(["one", "two"], 4)) == 2
            assert "MoE layer(s) 1 of UnusedTopKForCausalLM" in server.sere()["failed"]
            assert not any(row["rerouted"] for row in server.sere()["counters"].values())
            server.set_sere(enabled=True)  # it fails again


@pytest.mark.parametrize(
    ("architecture", "where"),
    [("NoTopKForCausalLM", "0-2"), ("UnusedTopKForCausalLM", "1")],
)
def test_router_of_its_own_is_refused_by_name(
    architecture: str, where: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = _renamed(checkpoint("qwen3_moe"), tmp_path / "model", architecture)
    result = refusal_of(
        f"--model-path={model}",
        *SERE,
        warm_up=True,
        env=OWN_ROUTER,
    )
    assert result.returncode != 0
    told = [line for line in result.stderr.splitlines() if "--moe-backend sere:" in line]
    assert any(architecture in line and f"MoE layer(s) {where} " in line for line in told), (
        result.stderr[-3000:]
    )


def test_worker_without_the_plugin_stops_the_launch(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The flag is known to the launcher, but the scheduler process does not load the plugin."""
    folder = tmp_path / "site"
    folder.mkdir()
    # Runs in every Python process; multiprocessing children are the schedulers.
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if '--multiprocessing-fork' in sys.argv or 'spawn_main' in ' '.join(sys.orig_argv):\n"
        "    os.environ['SGLANG_PLUGINS'] = 'sere-cpu-engine'\n"
    )
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    model = f"--model-path={checkpoint('qwen3_moe')}"
    result = refusal_of(model, *SERE, env={"PYTHONPATH": path}, fork_workers=False)
    assert result.returncode == 2, result.stderr[-3000:]
    told = [line for line in result.stderr.splitlines() if "started without it" in line]
    assert len(told) == 1 and told[0].startswith("sere-sglang: error: --moe-backend sere: ")


def _renamed(model: Path, folder: Path, architecture: str) -> Path:
    from tests.server.profiles import write_profile

    folder.mkdir()
    for file in model.iterdir():
        if file.name not in ("config.json", "sere_profile.safetensors"):
            (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config))
    write_profile(folder)
    return folder
