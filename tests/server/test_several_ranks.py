"""Two ranks of one real server decide and re-route alike, at the same steps."""

from __future__ import annotations

import concurrent.futures
import json
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sere_sglang.schedule.cost import StepModel
from tests.server.cost_files import write_cost
from tests.server.faults import Faults, install
from tests.server.harness import TWO_RANKS, Server, refusal_of, serve
from tests.server.shadowed import assert_ranks_brake_together, sure_of_its_tokens

PROMPTS = [f"request number {i} " * (1 + i % 3) for i in range(10)]
EAGER = {"policy": "adaptive", "quality_budget": 1.0, "min_gain": 0.0, "min_batch": 1}
LOCAL = ("time", "after_idle", "spent_loss")  # what ranks may see differently; no decision reads it

Step = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path], folder: Path) -> Path:
    return sure_of_its_tokens(checkpoint("qwen3_moe"), folder / "model")


def _serve(model: Path, folder: Path, name: str, *flags: str, **env: str) -> Any:
    cost = write_cost(model, folder / f"{name}.cost.json", step=StepModel())
    flags = (
        "--moe-backend=sere",
        f"--sere-cost={cost}",
        f"--sere-trace={folder / name}.jsonl",
        *flags,
    )
    whole = "--attn-dp-size=2" not in flags
    log = folder / f"{name}.log"
    return serve(model, log, *flags, whole_batches=whole, env=TWO_RANKS | env)


@pytest.fixture
def tensor_parallel(model: Path, folder: Path) -> Iterator[Server]:
    faults = install(folder / "faults")
    with _serve(model, folder, "tp", "--tp-size=2", **faults) as server:
        yield server


@pytest.fixture(scope="module")
def dp_attention(checkpoint: Callable[[str], Path], folder: Path) -> Iterator[Server]:
    flags = ("--tp-size=2", "--attn-dp-size=2")
    with _serve(checkpoint("qwen3_moe"), folder, "dp", *flags) as server:
        yield server


def test_tensor_parallel(tensor_parallel: Server, folder: Path) -> None:
    server = tensor_parallel
    _load_under_every_policy(server)
    for qualities in (["exact", "fast"], ["balanced", "exact", "fast"]):
        each = [_sampling(qualities[i % len(qualities)]) for i in range(len(PROMPTS))]
        server.post("/generate", {"text": PROMPTS, "sampling_params": each})
    first, second = _traces(server, folder / "tp.jsonl")
    assert first == second
    _assert_worth_comparing(first)
    assert any(s["exact_rows"] for s in first) and any(s["fast_rows"] for s in first)
    _assert_a_failing_rank_stops_both(server, folder)
    assert_ranks_brake_together(server)


def test_replicas_decide_for_themselves(model: Path, folder: Path) -> None:
    """--dp-size alone: every replica measures, decides and traces by itself, and brakes with the
    others."""
    with _serve(model, folder, "replicas", "--dp-size=2") as server:
        server.set_sere(**EAGER)
        server.generate(PROMPTS[:7], 12)
        states = [state["sere"] for state in server.get("/server_info")["internal_states"]]
        assert [state["policy"] for state in states] == ["adaptive"] * 2
        assert all(state["counters"]["0"]["rerouted"] for state in states)
        server.set_sere(reset_counters=False)
        path = folder / "replicas.jsonl"
        rows = [
            max(json.loads(line)["decode_tokens"] for line in file.read_text().splitlines())
            for file in (path, path.with_name(path.name + ".replica1"))
        ]
        assert sorted(rows) == [3, 4]
        assert_ranks_brake_together(server)


def test_every_pipeline_stage_follows_live_settings(
    checkpoint: Callable[[str], Path], folder: Path
) -> None:
    """SGLang hands a request on from stage to stage: the first one must leave it as it came."""
    with _serve(checkpoint("qwen3_moe"), folder, "pp", "--pp-size=2") as server:
        for changes in ({"policy": "static", "primary_k": 1, "min_batch": 1}, {"enabled": False}):
            server.set_sere(**changes)
            server.generate(PROMPTS[:4], 12)
        server.set_sere(reset_counters=False)
        stages = _traces(server, folder / "pp.jsonl")
    for steps in stages:
        decode = [step["point"]["enabled"] for step in steps if step["mode"] == "decode"]
        assert True in decode and not any(decode[-8:])


def test_dp_attention_decides_from_the_gathered_rows(dp_attention: Server, folder: Path) -> None:
    server = dp_attention
    server.set_sere(**EAGER)
    server.generate(PROMPTS[:1], 24)  # one group decodes, the other has nothing to do
    server.generate(PROMPTS[:5], 24)
    _load_under_every_policy(server)
    first, second = _traces(server, folder / "dp.jsonl")
    assert first == second
    _assert_worth_comparing(first)
    decode = [s["decode_tokens"] for s in first if s["mode"] == "decode"]
    assert {1, 5, len(PROMPTS)} <= set(decode), "rows of both groups together"
    # One group's prefill makes the forward no decode step for the other one either.
    assert not any(s["point"]["enabled"] for s in first if s["mode"] == "mixed")


def test_dp_attention_ranks_route_the_same_rows_alike(dp_attention: Server) -> None:
    server = dp_attention
    server.set_sere(policy="static", primary_k=1, threshold=0.9, min_batch=1, reset_counters=True)
    moved = server.generate(PROMPTS, 32)
    ranks = [state["sere"] for state in server.get("/server_info")["internal_states"]]
    assert len(ranks) == 2 and ranks[0]["counters"] == ranks[1]["counters"]
    for layer in ranks[0]["counters"].values():
        assert layer["rerouted"] > 0 and layer["critical"] > 0
        assert layer["active_after"] < layer["active_before"]
        assert layer["rows"] > layer["forwards"] * len(PROMPTS) / 2, "no more than one group's"
    server.set_sere(enabled=False, reset_counters=True)
    plain = server.generate(PROMPTS, 32)
    assert any(a["output_ids"] != b["output_ids"] for a, b in zip(moved, plain, strict=True))
    ranks = [state["sere"] for state in server.get("/server_info")["internal_states"]]
    assert all(not layer["rerouted"] for r in ranks for layer in r["counters"].values())


def test_dp_attention_has_no_quality_per_request(dp_attention: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        dp_attention.post("/generate", {"text": PROMPTS[0], "sampling_params": _sampling("exact")})
    assert refusal.value.code == 400
    assert "not allowed on this server (--sere-allow-quality balanced)" in (
        refusal.value.read().decode()
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--sere-quality=exact"], "--sere-quality exact: per-request quality is not available"),
        (["--sere-allow-quality=exact,balanced"], "--sere-allow-quality exact,balanced: per-req"),
        (["--enable-dp-attention-local-control-broadcast"], "what rank 0 measures"),
    ],
)
def test_what_dp_attention_rules_out(
    checkpoint: Callable[[str], Path], flags: list[str], named: str
) -> None:
    result = refusal_of(
        f"--model-path={checkpoint('qwen3_moe')}",
        "--moe-backend=sere",
        "--tp-size=2",
        "--dp-size=2",
        "--enable-dp-attention",
        *flags,
    )
    assert result.returncode == 2
    assert named in result.stderr and "--enable-dp-attention" in result.stderr


def _assert_a_failing_rank_stops_both(server: Server, folder: Path) -> None:
    """At the same step; and both go on from the same one when they are told to."""
    faults = Faults(folder / "faults")
    server.set_sere(policy="static", primary_k=1, threshold=0.0, min_batch=1, tpot_slo_ms=None)
    before, _ = _traces(server, folder / "tp.jsonl")
    for rank, hook in (
        (1, "topk._post_process_topk_ids (before)"),
        (0, "ModelRunner.forward (around)"),
    ):
        faults.start(hook, rank=rank)
        server.generate(PROMPTS, 8)
        assert faults.fired and hook in server.sere()["failed"]
        faults.stop()
        told = [line for line in server.log.read_text().splitlines() if "SERE stops" in line]
        assert hook in told[-1] and f"TP{1 - rank}" in told[-1], "the other rank"
        if rank == 1:  # whose decisions are whole, so that both have traced the same
            first, second = _traces(server, folder / "tp.jsonl")
            assert first == second
            assert len(first) <= len(before) + 4, "steps until both knew"
        server.set_sere(enabled=True, reset_counters=True)
        server.generate(PROMPTS, 8)
        state = server.sere()
        assert state["failed"] is None and state["counters"]["0"]["rerouted"] > 0


def _load_under_every_policy(server: Server) -> None:
    """Policies change while requests run; slo is given a target it has to move for."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for changes in (
            EAGER,
            EAGER | {"policy": "slo", "tpot_slo_ms": 0.01},
            {"policy": "static", "primary_k": 2, "threshold": 0.3},
            EAGER | {"policy": "slo", "tpot_slo_ms": 10000.0},
        ):
            running = pool.submit(server.generate, PROMPTS, 40)
            time.sleep(0.3)
            server.set_sere(**changes)
            running.result()


def _assert_worth_comparing(steps: list[Step]) -> None:
    points = {s["point"]["name"] for s in steps}
    assert len(points) > 2 and {"exact", "S=2 rho=0.3"} <= points
    assert len({s["budget"] for s in steps}) > 1, "feedback arrived"
    assert len({s["step_ms"] for s in steps}) > 3


def _traces(server: Server, path: Path) -> tuple[list[Step], list[Step]]:
    """Of both ranks, without what may differ, once both have written everything out."""
    files = (path, path.with_name(path.name + ".rank1"))
    deadline = time.monotonic() + 120
    while True:
        server.set_sere(reset_counters=False)
        seen = [
            [
                {k: v for k, v in json.loads(line).items() if k not in LOCAL}
                for line in file.read_text().splitlines()
            ]
            for file in files
        ]
        if len(seen[0]) == len(seen[1]) or time.monotonic() > deadline:
            return seen[0], seen[1]
        time.sleep(0.5)


def _sampling(quality: str) -> dict[str, Any]:
    return {
        "temperature": 0,
        "max_new_tokens": 12,
        "ignore_eos": True,
        "custom_params": {"sere": quality},
    }
