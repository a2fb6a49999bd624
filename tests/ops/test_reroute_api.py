"""Argument checks, the control block, the choice of implementation, the torch custom op."""

from __future__ import annotations

import logging
import types
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sere_sglang.ops import (
    COUNTER_FIELDS,
    BuildError,
    LayerTable,
    available_impls,
    decode_control,
    dispatch,
    encode_control,
    new_counters,
    registry,
    reroute,
    reroute_,
    select_impl,
)
from tests.ops import cases
from tests.ops.cases import Spec

IDS = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
SIMILARITY = torch.eye(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk_ids": [[0, 1]]}, "topk_ids must be a torch.Tensor, got list"),
        ({"topk_ids": IDS.float()}, "topk_ids must be int32 or int64"),
        ({"topk_ids": IDS[0]}, r"topk_ids must be \[T, K\]"),
        ({"topk_ids": IDS + 1}, r"in \[0, E=4\), found 1 to 4"),
        ({"topk_ids": IDS - 2}, r"in \[0, E=4\), found -2 to 1"),
        ({"similarity": None}, "similarity must be a torch.Tensor, got NoneType"),
        ({"similarity": SIMILARITY.to("meta")}, "similarity is on meta, topk_ids on cpu"),
        ({"similarity": torch.ones(4, 3)}, "similarity must be square"),
        ({"similarity": torch.ones(4, 4, dtype=torch.int32)}, "similarity must be floating"),
        ({"similarity": torch.full((4, 4), float("nan"))}, "similarity contains NaN"),
        ({"similarity": torch.full((4, 4), -float("inf"))}, "similarity contains NaN or infinity"),
        ({"topk_weights": torch.full((2, 2), float("nan"))}, "topk_weights contains NaN"),
        ({"similarity": torch.ones(1025, 1025)}, "at most 1024 experts"),
        ({"primary_k": 1.0}, "primary_k must be an integer, got float"),
        ({"primary_k": None}, "primary_k must be an integer, got NoneType"),
        ({"threshold": "0"}, "threshold must be a number, got str"),
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5"),
        ({"threshold": float("nan")}, r"threshold must be in \[0, 1\]"),
        ({"num_valid": 1.5}, "num_valid must be an integer, got float"),
        ({"num_valid": -1}, r"num_valid must be in \[0, T=2\], got -1"),
        ({"num_valid": 3}, r"num_valid must be in \[0, T=2\], got 3"),
        ({"topk_weights": 1.0}, "topk_weights must be a torch.Tensor, got float"),
        ({"topk_weights": torch.ones(2, 2, device="meta")}, "topk_weights is on meta"),
        ({"topk_weights": torch.ones(2, 3)}, r"topk_weights must be .*\[2, 2\]"),
        ({"topk_weights": torch.ones(2, 2, dtype=torch.int64)}, "topk_weights must be floating"),
        ({"protected": torch.zeros(3, dtype=torch.bool)}, r"protected must be bool \[T=2\]"),
        ({"protected": torch.zeros(2)}, "protected must be bool"),
        ({"protected": [True, False]}, "protected must be a torch.Tensor, got list"),
        ({"protected": torch.ones(2, dtype=torch.bool, device="meta")}, "protected is on meta"),
        ({"impl": "fast"}, "impl 'fast' .* choose one of: auto, torch, cpu, triton, cuda"),
    ],
)
def test_reroute_names_the_argument_that_does_not_fit(
    arguments: dict[str, object], message: str
) -> None:
    valid = {"topk_ids": IDS, "similarity": SIMILARITY, "primary_k": 1}
    with pytest.raises((ValueError, TypeError), match=message):
        reroute(**{**valid, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk_ids": IDS.long()}, "topk_ids must be torch.int32"),
        ({"topk_ids": IDS.T.contiguous().T}, "topk_ids must have unit stride"),
        ({"topk_weights": torch.ones(2, 2, dtype=torch.bfloat16)}, "topk_weights must be"),
        ({"control": torch.zeros(8, dtype=torch.int32)}, r"control must be .*\[16\]"),
        ({"row_class": torch.zeros(1, dtype=torch.uint8)}, r"row_class must be \[>= T=2\]"),
        ({"row_class": torch.zeros(2, dtype=torch.int32)}, "row_class must be torch.uint8"),
        ({"counters": torch.zeros(6, dtype=torch.int32)}, "counters must be torch.int64"),
        ({"table": LayerTable(SIMILARITY.double())}, "similarity must be torch.float32"),
        ({"table": LayerTable(SIMILARITY, scale=torch.eye(3))}, "scale must be"),
    ],
)
def test_reroute_in_place_names_the_argument_that_does_not_fit(
    arguments: dict[str, object], message: str
) -> None:
    valid = {
        "topk_ids": IDS.clone(),
        "topk_weights": None,
        "table": LayerTable.build(SIMILARITY),
        "control": encode_control(enabled=True, num_valid=-1, classes=[(1, 0.0)]),
        "distinct": False,
    }
    with pytest.raises(ValueError, match=message):
        reroute_(**{**valid, **arguments})


def test_table_refuses_what_kernels_cannot_hold() -> None:
    with pytest.raises(ValueError, match="NaN"):
        LayerTable.build(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="square"):
        LayerTable.build(torch.ones(2, 3))
    with pytest.raises(ValueError, match="scale is"):
        LayerTable.build(torch.eye(2), scale=torch.eye(3))


def test_neighbors_are_by_similarity_then_lowest_id() -> None:
    similarity = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.9], [0.5, 0.9, 1.0]])
    table = LayerTable.build(similarity.to(torch.bfloat16))
    assert table.neighbors is not None
    assert table.neighbors.tolist() == [[0, 1, 2], [1, 2, 0], [2, 1, 0]]
    assert table.similarity.dtype == torch.float32


@hypothesis.settings(deadline=None)
@given(
    st.booleans(),
    st.integers(-1, 2**31 - 1),
    st.lists(st.tuples(st.integers(-1, 64), st.floats(0, 1, width=32)), min_size=1, max_size=4),
)
def test_control_block_survives_the_round_trip(
    enabled: bool, num_valid: int, classes: list[tuple[int, float]]
) -> None:
    control = encode_control(enabled=enabled, num_valid=num_valid, classes=classes)
    assert control.shape == (16,)
    decoded = decode_control(control)
    assert (decoded.enabled, decoded.num_valid) == (enabled, num_valid)
    assert decoded.classes == tuple(classes)


@pytest.mark.parametrize("classes", [[], [(1, 0.0)] * 5, [(1, 1.5)], [(1, -0.1)]])
def test_control_block_refuses(classes: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match=r"classes|threshold"):
        encode_control(enabled=True, num_valid=-1, classes=classes)


def test_counters_accumulate(impl: str) -> None:
    case = cases.make_case(Spec(num_tokens=6, classes=((1, 0.0),)))
    table = LayerTable.build(case.similarity)
    control = encode_control(enabled=True, num_valid=-1, classes=[(1, 0.0)])
    counters = new_counters(2)
    assert case.weights is not None
    for _ in range(3):
        ids, weights = case.ids.clone(), case.weights.clone()
        reroute_(ids, weights, table, control, counters=counters[1], impl=impl)
    want = cases.expected(case).counters
    assert counters[0].tolist() == [0] * len(COUNTER_FIELDS)
    assert counters[1].tolist() == [3 * want[name] for name in COUNTER_FIELDS]
    assert want["active_after"] < want["active_before"]


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_auto", {})
    monkeypatch.setattr(dispatch, "_ready", {})
    yield


class Broken:
    @staticmethod
    def is_available(device_type: str) -> str | None:
        return None

    @staticmethod
    def build() -> None:
        raise BuildError("reroute does not compile: reroute.cpp:1: error: no such thing")


def pretend(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    """Put `module` in the place of the implementation named cpu."""
    real = registry.importlib.import_module
    monkeypatch.setattr(
        registry,
        "importlib",
        types.SimpleNamespace(
            import_module=lambda name: (
                module if name == "sere_sglang.ops.cpu.reroute" else real(name)
            )
        ),
    )


def test_auto_passes_over_a_failing_build_with_the_compilers_error(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, Broken)
    with caplog.at_level(logging.INFO, logger="sere_sglang"):
        assert select_impl("cpu") == "torch"
        assert select_impl("cpu") == "torch"
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    choices = [r.getMessage() for r in caplog.records if "uses implementation" in r.getMessage()]
    assert len(warnings) == 1 and "reroute.cpp:1: error: no such thing" in warnings[0]
    assert len(choices) == 1


def test_strict_choice_raises_a_failing_build(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, Broken)
    with pytest.raises(BuildError, match="no such thing"):
        select_impl("cpu", strict=True)


def test_what_cannot_serve_the_device_is_no_failure(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(Broken):
        @staticmethod
        def is_available(device_type: str) -> str | None:
            return "needs a compiler"

    pretend(monkeypatch, Elsewhere)
    assert select_impl("cpu", strict=True) == "torch"
    with pytest.raises(RuntimeError, match="needs a compiler"):
        reroute(IDS, SIMILARITY, primary_k=1, impl="cpu")


def test_a_gpu_without_nvcc_is_told_what_it_serves_without(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(name: str, _device_type: str) -> None:
        if name == "cuda":
            raise registry.UnavailableError("cuda needs nvcc")

    monkeypatch.setattr(dispatch, "load_impl", load)
    with caplog.at_level("WARNING"):
        assert select_impl("cuda", strict=True) == "triton"
    assert "uses implementation 'triton' (cuda needs nvcc)" in caplog.text
    assert "with nvcc on PATH it is CUDA kernels, fused with top-k" in caplog.text


def test_cuda_is_refused_for_cpu_tensors() -> None:
    assert "cuda" not in available_impls("cpu")
    with pytest.raises(RuntimeError, match="impl 'cuda': "):
        reroute(IDS, SIMILARITY, primary_k=1, impl="cuda")


def op_arguments(impl: str, weights: bool, scale: bool) -> tuple[object, ...]:
    case = cases.make_case(Spec(num_tokens=5, classes=((1, 0.0),), scale=scale))
    table = LayerTable.build(case.similarity, case.scale)
    control = encode_control(enabled=True, num_valid=4, classes=[(1, 0.0), (4, 0.0)])
    row_class = torch.tensor([0, 1, 0, 0, 0], dtype=torch.uint8)
    return (
        case.ids,
        case.weights if weights else None,
        table.similarity,
        table.neighbors,
        table.scale,
        control,
        row_class,
        new_counters(1)[0].clone(),
        weights,
        impl,
    )


@pytest.mark.parametrize(("weights", "scale"), [(False, False), (True, False), (True, True)])
def test_custom_op_declares_what_it_does(impl: str, weights: bool, scale: bool) -> None:
    torch.library.opcheck(torch.ops.sere.reroute_.default, op_arguments(impl, weights, scale))


def test_op_inside_torch_compile(impl: str) -> None:
    ids, weights, similarity, neighbors, scale, control, row_class, counters, *_ = op_arguments(
        impl, True, True
    )

    def step(ids: torch.Tensor, weights: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
        table = LayerTable(similarity, neighbors, scale)
        ids = ids + 0
        reroute_(ids, weights, table, control, row_class=row_class, counters=counters, impl=impl)
        return ids * 2

    eager_weights, eager_counters = weights.clone(), counters.clone()
    eager = step(ids, eager_weights, eager_counters)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(ids, weights, counters)
    assert torch.equal(compiled, eager)
    assert torch.equal(weights, eager_weights)
    assert torch.equal(counters, eager_counters)
    assert int(counters[0]) == 1
