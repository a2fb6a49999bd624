"""A layer as a GPU serves it under rules beside ``similarity``: what the device holds decides.

On a GPU in a captured graph; on a CPU under TRITON_INTERPRET=1 by the same calls.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from sere_sglang.names import RowClass
from sere_sglang.ops import LayerTable
from sere_sglang.ops.rules import load_rules
from sere_sglang.ops.surrogates import Surrogates
from sere_sglang.ops.triton.phases import INTERPRETED
from sere_sglang.runtime import stage as stage_module
from sere_sglang.runtime.control import ControlBlock
from sere_sglang.runtime.counters import FIELDS
from sere_sglang.runtime.graph_rules import GraphRules, RuleWords
from sere_sglang.runtime.rule_stage import RuleForward, RuleStage
from sere_sglang.runtime.stage import RerouteStage, Switch
from sere_sglang.schedule.point import OFF, OperatingPoint

if INTERPRETED:
    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    pytest.skip("needs a CUDA GPU or TRITON_INTERPRET=1", allow_module_level=True)

ROWS, EXPERTS, TOP_K, SIZE, LAYER = 9, 24, 4, 40, 3
ROUTER = SimpleNamespace(scoring_func="softmax", custom_routing_function=None)
POINTS = [
    OperatingPoint(True, 2, rule="piggyback"),
    OFF,
    OperatingPoint(True, 2, rule="topk"),
    OperatingPoint(True, 1, 0.0),
    OperatingPoint(True, rule="energy", loss=0.08),
    OperatingPoint(True, rule="budget", experts=7),
    OperatingPoint(True, rule="energy", loss=0.02, layers=((LAYER, OFF),)),
    OperatingPoint(True, rule="energy", loss=0.2),
]
EXPERT_LOSS = torch.linspace(0.1, 1.9, EXPERTS)
NOBODY, SOME = b"", bytes([0, RowClass.EXACT, RowClass.FAST, 0, 2, 0, 0])


def layer(rank: int = 2) -> Surrogates:
    generator = torch.Generator().manual_seed(5)
    inward, outward = torch.randn(2, EXPERTS, rank, SIZE, generator=generator) / 3
    bias = torch.randn(EXPERTS, SIZE, generator=generator)
    return Surrogates.build(inward, outward, bias, device=DEVICE)


class Served:
    """One layer with what a rank writes before a forward, and buffers of a fixed place."""

    def __init__(self, surrogates: Surrogates | None, share: float = 1.0) -> None:
        words = RuleWords(EXPERTS, 2.25, True, surrogates is not None)
        self.control = ControlBlock(torch.device(DEVICE), [LAYER], 64, {LAYER: words})
        assert self.control.rule_words is not None
        self.counters = torch.zeros(len(FIELDS), dtype=torch.int64, device=DEVICE)
        self.rules = GraphRules(
            LAYER, words, self.control.rule_words[0], self.counters, surrogates, share,
            None if surrogates is None else EXPERT_LOSS.to(DEVICE),
        )  # fmt: skip
        half = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(1))
        self.stage = RerouteStage(
            LAYER, TOP_K, LayerTable.build((half + half.T) / 2, device=DEVICE),
            self.control.words[0], self.control.row_class, self.counters[:6], Switch(captures=True),
            "triton", rules=self.rules,
        )  # fmt: skip
        self.logits = torch.zeros(ROWS, EXPERTS, dtype=torch.bfloat16, device=DEVICE)
        self.hidden = torch.zeros(ROWS, SIZE, dtype=torch.bfloat16, device=DEVICE)
        self.ids = torch.zeros(ROWS, TOP_K, dtype=torch.int32, device=DEVICE)
        self.weights = torch.zeros(ROWS, TOP_K, device=DEVICE)
        self.output = torch.zeros(ROWS, SIZE, dtype=torch.bfloat16, device=DEVICE)

    def load(self, seed: int) -> None:
        """What a forward begins with; the layer itself would give output 1."""
        generator = torch.Generator().manual_seed(seed)
        self.logits.copy_(torch.randn(ROWS, EXPERTS, generator=generator))
        self.hidden.copy_(torch.randn(ROWS, SIZE, generator=generator))

    def step(self) -> None:
        """As patches/topk.py and patches/surrogates.py call it."""
        weights, ids = self.logits.float().softmax(-1).topk(TOP_K)
        self.ids.copy_(ids)
        self.weights.copy_(1.5 * weights / weights.sum(1, keepdim=True))
        self.stage.run(self.ids, self.weights, self.logits, ROUTER)
        begun = self.rules.compensation(self.hidden)
        self.output.fill_(1.0)
        if begun is not None:
            self.rules.add_compensation(self.output, begun)

    def write(self, point: OperatingPoint, valid: int, classes: bytes, surrogates: bool) -> None:
        own = ((TOP_K, 0.0), (2, 0.0)) if classes else ()
        self.control.write(
            point, valid, classes, own, fast_keep=2, surrogates=surrogates
        )  # fmt: skip


def by_the_cpu_engine(
    served: Served, point: OperatingPoint, valid: int, classes: bytes, surrogates: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, weights, counters and output of the same forward, all in torch."""
    own = served.rules.surrogates
    if own is not None:
        own = Surrogates(own.inward.cpu(), own.outward.cpu(), own.bias.cpu())
    counters = torch.zeros(len(FIELDS), dtype=torch.int64)
    stage = RuleStage(
        LAYER, EXPERTS, 2.25, load_rules("torch", "cpu"), counters, own, expert_loss=EXPERT_LOSS
    )
    logits, hidden = served.logits.cpu(), served.hidden.cpu()
    weights, ids = served.logits.float().softmax(-1).topk(TOP_K)
    weights, ids = (1.5 * weights / weights.sum(1, keepdim=True)).cpu(), ids.int().cpu()
    rows = torch.frombuffer(bytearray(classes), dtype=torch.uint8) if classes else None
    stage.apply(ids, weights, logits, ROUTER, RuleForward(point, valid, rows, 2, surrogates))
    output = torch.ones(ROWS, SIZE)
    added = stage.compensation(hidden.float())
    if added is not None:
        stage.add_compensation(output, added)
    return ids, weights, counters, output


@pytest.fixture(params=[True, False], ids=["surrogates", "none"])
def served(request: pytest.FixtureRequest) -> Served:
    return Served(layer() if request.param else None)


def test_one_graph_is_what_the_cpu_engine_does(served: Served) -> None:
    """Under every rule, with classes, padding and surrogates switched from forward to forward."""
    run = captured(served.step) if DEVICE == "cuda" else served.step
    for turn in range(2 * len(POINTS)):
        point = POINTS[turn % len(POINTS)]
        valid, classes = (ROWS, NOBODY) if turn % 3 else (7, SOME)
        surrogates = turn < len(POINTS)
        served.load(turn)
        served.write(point, valid, classes, surrogates)
        served.counters.zero_()
        run()
        if point.enabled and point.rule == "similarity":
            assert served.counters[0] == 1 and served.counters[4] > 0
            assert (served.output == 1.0).all()
            continue
        ids, weights, counters, output = by_the_cpu_engine(
            served, point, valid, classes, surrogates
        )
        assert torch.equal(served.ids.cpu(), ids), point
        torch.testing.assert_close(served.weights.cpu(), weights, rtol=1e-5, atol=1e-7)
        # A GPU's softmax may round otherwise than the CPU's.
        torch.testing.assert_close(served.counters.cpu(), counters, rtol=1e-4, atol=0)
        torch.testing.assert_close(served.output.cpu().float(), output, rtol=2**-7, atol=2**-7)
        lost = served.output.cpu() != 1.0
        compensates = point.rule == "energy" and surrogates and served.rules.surrogates is not None
        assert bool(lost.any()) == (compensates and point.at(LAYER).enabled)


def test_an_eager_forward_launches_one_of_the_two(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph holds both, since it will run under every rule."""
    launched: list[str] = []
    monkeypatch.setattr(stage_module, "reroute_", lambda *_, **__: launched.append("similarity"))
    monkeypatch.setattr(served.rules, "apply", lambda *_: launched.append("rules"))
    switch = served.stage.switch
    rule = RuleForward(POINTS[0], ROWS, None, 2, True)
    for switch.captures, switch.rule, expected in (
        (True, None, ["similarity", "rules"]),
        (False, None, ["similarity"]),
        (False, rule, ["rules"]),
    ):
        launched.clear()
        served.stage.run(served.ids, served.weights, served.logits, ROUTER)
        assert launched == expected


def captured(step: Callable[[], None]) -> Callable[[], None]:
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def test_the_shares_of_two_ranks_add_up_to_one_layer() -> None:
    outputs = []
    for share in (1.0, 0.5, 0.5):
        one = Served(layer(rank=3), share)
        one.load(7)
        one.write(POINTS[-1], ROWS, NOBODY, True)
        one.step()
        outputs.append(one.output.float() - 1.0)
    whole, first, second = outputs
    assert whole.abs().sum() > 0
    torch.testing.assert_close(first + second, whole, rtol=2**-5, atol=2**-5)


def test_a_layer_of_another_size_is_refused() -> None:
    one = Served(layer())
    one.stage.run(one.ids, one.weights, one.logits, ROUTER)
    with pytest.raises(ValueError, match=r"hidden must be floating \[9, 40\]"):
        one.rules.compensation(one.hidden[:, :-1])


def test_a_mean_alone_is_a_surrogate() -> None:
    one = Served(layer(rank=0))
    one.load(8)
    one.write(POINTS[-1], ROWS, NOBODY, True)
    one.step()
    *_, output = by_the_cpu_engine(one, POINTS[-1], ROWS, NOBODY, True)
    torch.testing.assert_close(one.output.cpu().float(), output, rtol=2**-7, atol=2**-7)


def test_logits_that_do_not_reach_us_are_named(served: Served) -> None:
    with pytest.raises(ValueError, match="MoE layer 3: its router's logits"):
        served.stage.run(served.ids, served.weights, None, ROUTER)


def test_more_rows_than_sums_hold_stay_exact(served: Served) -> None:
    served.write(POINTS[0], -1, NOBODY, True)
    ids = torch.arange(TOP_K, dtype=torch.int32, device=DEVICE).repeat(8193, 1)
    weights = torch.ones(8193, TOP_K, device=DEVICE)
    served.rules.apply(ids, weights, None, None, ROUTER, None)
    assert (ids[0] == torch.arange(TOP_K, device=DEVICE)).all() and (weights == 1.0).all()
    assert served.rules.compensation(torch.zeros(8193, SIZE, device=DEVICE)) is None


@pytest.fixture
def dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with torch._dynamo.config.patch(disable=False):
        torch._dynamo.reset()
        yield CompileCounter()


def test_torch_compile_traces_it_once(served: Served, dynamo: Any) -> None:
    compiled = torch.compile(served.step, backend=dynamo, dynamic=False, fullgraph=True)
    for turn, point in enumerate(POINTS):
        served.load(turn)
        served.write(point, ROWS, NOBODY, True)
        served.step()
        want = [t.clone() for t in (served.ids, served.weights, served.output)]
        compiled()
        assert all(map(torch.equal, (served.ids, served.weights, served.output), want)), point
    assert dynamo.frame_count == 1
