"""What CUDA graphs hold of re-routing. No GPU captures here: the hooks are called as SGLang's
runners would be, around forwards that run a rank's stages."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner

from sere_sglang.errors import SereError
from sere_sglang.options import SereConfig
from sere_sglang.patches import cuda_graphs
from sere_sglang.patches.seam import check_parameters
from sere_sglang.runtime import process
from sere_sglang.runtime.rank import SereRuntime
from sere_sglang.runtime.service import Service
from sere_sglang.schedule.composition import BatchComposition
from tests.runtime.one_rank import TOP_K, one_rank

TARGET, DRAFT = (
    SimpleNamespace(model_runner=SimpleNamespace(is_draft_worker=draft)) for draft in (False, True)
)


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> Iterator[SereRuntime]:
    made = one_rank(SereConfig(moe_backend="sere"))
    made._captured.clear()
    monkeypatch.setattr(process, "_current", made)
    yield made


class Forward:
    """What a capture runs: every layer's stage but those left out."""

    def __init__(self, made: SereRuntime, *left_out: int) -> None:
        self.made = made
        self.left_out = left_out
        self.launched: list[bool] = []

    def __call__(self, *_args: Any, **_kwargs: Any) -> str:
        self.launched.append(self.made.binding.switch.launch)
        for stage in self.made.binding.stages:
            if stage.layer_id not in self.left_out:
                ids = torch.arange(TOP_K, dtype=torch.int32).repeat(2, 1)
                stage.run(ids, torch.rand(2, TOP_K))
        return "captured"


def test_the_symbols_are_there() -> None:
    for runner, name in (
        (PrefillCudaGraphRunner, "capture"),
        (DecodeCudaGraphRunner, "capture_one_shape"),
    ):
        assert name in vars(runner)
        needs = ["size", "forward"] if runner is DecodeCudaGraphRunner else []
        check_parameters(f"{runner.__module__}.{runner.__name__}.{name}", needs)


def test_prefill_graphs_hold_no_launch_of_ours(active: SereRuntime) -> None:
    forward = Forward(active)
    assert cuda_graphs._capture_prefill(forward, TARGET) == "captured"
    assert forward.launched == [False]
    assert active.binding.switch.launch
    assert not active.binding.counters.any()


def test_decode_graphs_hold_them_while_one_is_captured_again(active: SereRuntime) -> None:
    forward = Forward(active)
    active.binding.switch.launch = False  # between the forwards of a stopped rank
    assert cuda_graphs._capture_decode(forward, TARGET, 8, object()) == "captured"
    assert forward.launched == [True]
    assert not active.binding.switch.launch


def test_every_decode_graph_is_looked_at(active: SereRuntime) -> None:
    cuda_graphs._capture_decode(Forward(active), TARGET, 8, object())
    with pytest.raises(SereError, match=r"layer\(s\) 1 of none .* CUDA graph of batch size 4"):
        cuda_graphs._capture_decode(Forward(active, 1), TARGET, 4, object())


def test_draft_models_are_left_alone(active: SereRuntime) -> None:
    for capture, args in ((cuda_graphs._capture_prefill, ()), (cuda_graphs._capture_decode, (4,))):
        forward = Forward(active, 0, 1)
        assert capture(forward, DRAFT, *args) == "captured"
        assert forward.launched == [True]


def test_the_first_forward_of_each_mode_is_looked_at(active: SereRuntime) -> None:
    active.serve(Service(warms_up=True))
    for mode in ("extend", "decode"):
        active.last = BatchComposition(mode, decode_tokens=2)
        Forward(active)()
        active.end_forward()
    active.last = BatchComposition("verify", verify_tokens=2)
    Forward(active, 2)()
    with pytest.raises(SereError, match=r"layer\(s\) 2 of none .* top-k \(verify\)"):
        active.end_forward()


def test_a_replay_runs_no_stage(active: SereRuntime) -> None:
    active.serve(Service(warms_up=True))
    active.last = BatchComposition("decode", decode_tokens=2)
    with pytest.raises(SereError):  # an eager forward that routes past all of them
        active.end_forward()
    cuda_graphs._capture_prefill(Forward(active), TARGET)
    active.binding.forget_runs()
    with pytest.raises(SereError):  # graphs of prefill say nothing of decoding
        active.end_forward()
    cuda_graphs._capture_decode(Forward(active), TARGET, 2, object())
    active.binding.forget_runs()
    active.end_forward()


def test_an_error_of_the_forward_is_not_hidden(active: SereRuntime) -> None:
    active.last = BatchComposition("decode", decode_tokens=2)
    active.end_forward(failed=True)
