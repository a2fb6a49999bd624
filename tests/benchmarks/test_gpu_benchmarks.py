"""The GPU benchmarks as far as a CPU goes: dry runs, the timer, the layers' routing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import layer, moe_layer, op, rules
from benchmarks._timing import Candidate, GraphTimer, copy_bandwidth
from sere_sglang.ops.cuda.plan import Form, Plan
from sere_sglang.ops.jit import BuildError
from sere_sglang.ops.registry import UnavailableError
from tests.ops import emulated

TOP_LEVEL = {"hardware", "torch", "cuda", "date", "rows", "failed"}
OP_ROW = {"impl": str, "T": int, "E": int, "K": int, "us": float}
LAYER_ROW = {
    "model": str,
    "batch": int,
    "primary_k": int,
    "us_plain": float,
    "us_sere": float,
    "active_plain": float,
    "active_sere": float,
    "gb_s": float,
}


def _rows(path: Path, schema: dict[str, type]) -> list[dict[str, Any]]:
    result = json.loads(path.read_text())
    assert result.keys() >= TOP_LEVEL
    assert result["failed"] == []
    assert result["rows"]
    for row in result["rows"]:
        assert {key: type(row[key]) for key in schema} == schema
    return result["rows"]


def test_op_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert op.main(["--dry-run"]) == 0
    rows = _rows(tmp_path / "op.json", OP_ROW)
    impls = {row["impl"] for row in rows}
    assert impls == {"cuda", "repeated", "fused", "triton", "published", "topk_only", "empty"}
    assert all("us_off" in row for row in rows if row["impl"] in ("cuda", "fused"))
    assert "published" in capsys.readouterr().out


def test_layer_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert layer.main(["--dry-run"]) == 0
    rows = _rows(tmp_path / "layer.json", LAYER_ROW)
    assert {row["primary_k"] for row in rows} == {1, 2, 3}
    assert all(row["active_sere"] < row["active_plain"] for row in rows)
    assert "reached" in capsys.readouterr().out


def test_rules_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert rules.main(["--dry-run"]) == 0
    rows = _rows(tmp_path / "rules.json", {"rule": str, "impl": str, "E": int, "us": float})
    assert {row["rule"] for row in rows} == set(rules.NAMES)
    assert "piggyback" in capsys.readouterr().out


def test_rules_are_timed_in_what_a_machine_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be had is said; what should be there and breaks is a failure."""

    def load(impl: str, device: str) -> None:
        if impl == "cuda":
            raise UnavailableError("impl 'cuda': no nvcc found")
        if impl == "broken":
            raise BuildError("error: expected ';'")

    monkeypatch.setattr(rules, "load_rules", load)
    assert rules.present(["triton", "cuda", "broken"]) == (
        ["triton"], ["broken: BuildError: error: expected ';'"],
    )  # fmt: skip
    assert "not timed: impl 'cuda': no nvcc found" in capsys.readouterr().out
    assert ("energy", "cuda") in rules.candidates_of(["triton", "cuda"])
    assert ("surrogates", "cuda") not in rules.candidates_of(["triton", "cuda"])


@pytest.mark.parametrize("name", ["off", "piggyback", "energy"])
def test_the_fused_rule_is_compared_before_it_is_timed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator in the GPU's place, and one that is wrong."""
    plan = Plan(Form.BLOCK, 1, 64)

    def right(*arguments: Any, **outputs: Any) -> Any:
        return emulated.fused_rule(plan, *arguments, **outputs)

    def wrong(*arguments: Any, **outputs: Any) -> Any:
        selected = right(*arguments, **outputs)
        return selected._replace(ids=selected.ids.flip(1))

    case = rules.RuleCase(5, 16, 4, 2, "cpu")
    monkeypatch.setattr(rules, "fused_topk_rule", right)
    assert len(case.candidate(name, "fused").calls) == 2
    monkeypatch.setattr(rules, "fused_topk_rule", wrong)
    with pytest.raises(AssertionError, match="differ from"):
        case.candidate(name, "fused")


@pytest.mark.parametrize("benchmark", [op, rules, layer], ids=["op", "rules", "layer"])
def test_says_that_there_is_no_gpu(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_spent_budget_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    for benchmark in (op, rules, layer):
        assert benchmark.main(["--dry-run", "--budget", "0"]) == 1
    for name in ("op", "rules", "layer"):
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert result["failed"] == ["stopped after 0 s"]


def test_a_wrong_implementation_is_named_and_left_out() -> None:
    from benchmarks._timing import HostTimer
    from benchmarks.op_cases import OpCase

    case = OpCase(tokens=6, experts=16, top_k=4, calls=2, device="cpu")
    impls = {
        "empty": lambda case, control: [lambda: None] * 2,
        "triton": lambda case, control: [lambda: None] * 2,  # re-routes nothing
    }
    rows, broken = op.measure(case, impls, HostTimer(), rounds=3)
    assert broken == ["triton"]
    assert [row["impl"] for row in rows] == ["empty"]


class _FakeGraph:
    """Records what is called while it is captured, and plays that back."""

    capturing: _FakeGraph | None = None

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


class _FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _FakeEvent) -> float:
        return 0.5  # milliseconds


class _FakeStream:
    def wait_stream(self, other: _FakeStream) -> None: ...


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA that runs on the CPU; only names that torch.cuda has can be replaced."""

    @contextlib.contextmanager
    def capture(graph: _FakeGraph, stream: _FakeStream) -> Any:
        _FakeGraph.capturing = graph
        try:
            yield
        finally:
            _FakeGraph.capturing = None

    for name, value in {
        "CUDAGraph": _FakeGraph,
        "graph": capture,
        "Event": _FakeEvent,
        "Stream": _FakeStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": _FakeStream,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_graph_timer_restores_before_every_replay(fake_cuda: None) -> None:
    log: list[str] = []

    def call(name: str) -> None:
        if _FakeGraph.capturing is not None:
            _FakeGraph.capturing.calls.append(lambda: log.append(name))

    def broken() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    timer = GraphTimer(flush=torch.zeros(4, dtype=torch.int32))
    timings = timer.measure(
        {
            "a": Candidate(
                [lambda: call("a1"), lambda: call("a2")], lambda: log.append("put back")
            ),
            "broken": Candidate([broken]),
        },
        rounds=4,
    )
    assert log == ["put back", "a1", "a2"] * 10  # five rounds, cold and warm
    assert timings["a"].cold == timings["a"].warm == 250.0  # 0.5 ms for two calls
    assert "broken" not in timings
    assert timer.errors == [
        "broken in a CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    ]


def test_copy_bandwidth_counts_both_ways(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype))
    assert copy_bandwidth("cuda", 1_000_000, rounds=3) == pytest.approx(2 * 1e6 / 0.5e-3 / 1e9)


def test_gate_gives_the_logits_it_was_made_for() -> None:
    shape = moe_layer.MoeShape("small", 24, 4, 128, 8, renormalize=True)
    made = moe_layer.make_layers(shape, 1, "cpu", torch.float32)[0]
    x = moe_layer.make_tokens(shape, made, batch=2000, seed=1)
    logits = x @ made.gate_t
    mean = logits.mean(dim=0) - logits.mean()
    popularity = made.popularity - made.popularity.mean()
    assert torch.corrcoef(torch.stack([mean, popularity]))[0, 1] > 0.6
    assert logits.var(dim=0).mean() == pytest.approx(2.0, rel=0.5)  # topic and token
