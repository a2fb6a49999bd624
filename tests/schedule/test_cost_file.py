"""Cost files: what is written is read back, and everything else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sere_sglang.errors import SereError
from sere_sglang.schedule.cost import MoeCost, StepModel
from sere_sglang.schedule.cost_file import (
    CostModel,
    check_cost_fits,
    describe,
    load_cost,
    save_cost,
)
from sere_sglang.schedule.layer_cost import LayerShape, MeasuredCost

MODEL = CostModel("a/model", "0123456789abcdef", (1, 2, 3), num_experts=16, top_k=4)
MS = [[0.5, np.nan, np.nan], [0.5, 1.0, 2.0], [0.75, 1.0, 2.5]]


def cost(**more: Any) -> MoeCost:
    narrow = MeasuredCost.fit(LayerShape(16, 4, 64, 32), (1, 4, 16), (4, 8, 16), np.array(MS))
    wide = MeasuredCost.fit(
        LayerShape(16, 4, 64, 96, "Fp8MoEMethod", 18432.0, 36864.0, 0.5),
        (1, 4, 16),
        (4, 8, 16),
        3 * np.array(MS),
    )
    return MoeCost(((narrow, (1, 3)), (wide, (2,))), hardware={"device": "a machine"}, **more)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_cost(tmp_path / "cost.json", MODEL, cost())
    return tmp_path / "cost.json"


@pytest.mark.parametrize("step", [None, StepModel(3.0, 0.01, 1.2)])
def test_what_is_written_is_read_back(tmp_path: Path, step: StepModel | None) -> None:
    written = cost(step=step, source="measured", seconds=0.5)
    save_cost(tmp_path / "cost.json", MODEL, written)
    read = load_cost(tmp_path / "cost.json")
    assert read.model == MODEL
    assert read.cost.source == "file" and read.cost.step == step
    told, again = describe(written), describe(read.cost)
    assert again["shapes"] == told["shapes"] and again["hardware"] == told["hardware"]
    assert told["shapes"][0]["ms"] == [[0.5, None, None], [0.5, 1.0, 2.0], [0.75, 1.0, 2.5]]
    for rows in (1, 3, 10, 500):
        active = np.linspace(0, 48, 9)
        assert read.cost.moe_ms(rows, active) == pytest.approx(written.moe_ms(rows, active))
    check_cost_fits(read, MODEL, "cost.json")


def _set(*keys: str | int, to: Any) -> Callable[[Any], None]:
    def change(body: Any) -> None:
        for key in keys[:-1]:
            body = body[key]
        if to is None:
            del body[keys[-1]]
        else:
            body[keys[-1]] = to

    return change


TABLE = ("shapes", 0, "ms")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("format", to=None), '"format" is not "sere-cost"'),
        (_set("version", to=2), "has version 2, this sere-sglang reads 1"),
        (_set("version", to=None), "has version None"),
        (_set("model", to=None), "model is missing"),
        (_set("model", to=[1]), "model must be an object"),
        (_set("model", "fingerprint", to=None), "model.fingerprint is missing"),
        (_set("model", "top_k", to=0), "model.top_k must lie in [1,"),
        (_set("model", "num_experts", to=True), "model.num_experts must be a whole number"),
        (_set("model", "layers", to=[]), "model.layers must have 1 to"),
        (_set("shapes", to=None), "shapes is missing"),
        (_set("shapes", to=[]), "shapes are of layers [], the model has [1, 2, 3]"),
        (_set("shapes", 0, "layers", to=[1, 2]), "shapes are of layers [1, 2, 2], the model has"),
        (_set("shapes", 0, "layers", to=[3, 1]), "shapes[0].layers must ascend"),
        (_set("shapes", 0, "layers", to=[1, 1.5]), "must be whole numbers from 0, got 1.5"),
        (_set("shapes", 0, to="x"), "shapes[0].num_experts is missing"),
        (_set("shapes", 1, "top_k", to=2), "a shape has 16 experts, top-2; the model 16, top-4"),
        (_set("shapes", 0, "rows", to=None), "shapes[0].rows is missing"),
        (_set("shapes", 0, "rows", to=[0, 4, 16]), "shapes[0].rows must be whole numbers from 1"),
        (_set("shapes", 0, "rows", to=list(range(1, 999))), "rows must have 1 to 256 entries"),
        (_set("shapes", 0, "rows", to=[1, 4, 10**400]), "shapes[0].rows must be whole numbers"),
        (_set("shapes", 0, "active", to=[4, 8, 17]), "active goes to 17, the layer has 16 experts"),
        (_set("shapes", 0, "expert_bytes", to=-1), "shapes[0].expert_bytes must lie in [0,"),
        (_set(*TABLE, to=[[1.0]]), "ms must have a line for each of 3 rows, each with 3"),
        (_set(*TABLE, 1, 1, to="x"), "shapes[0].ms[1][1] must be a number, got 'x'"),
        (_set(*TABLE, 1, 1, to=float("nan")), "shapes[0].ms[1][1] must lie in [1e-09, 1e+06]"),
        (_set(*TABLE, 1, 1, to=float("inf")), "shapes[0].ms[1][1] must lie in"),
        (_set(*TABLE, 1, 1, to=10**400), "shapes[0].ms[1][1] must lie in"),
        (_set(*TABLE, 1, 1, to=-1.0), "shapes[0].ms[1][1] must lie in"),
        (_set(*TABLE, 1, 1, to=0), "shapes[0].ms[1][1] must lie in"),
        (_set(*TABLE, 1, 1, to=2.5), "shapes[0].ms falls along rows, from 2.5 to 1"),
        (_set(*TABLE, 2, 0, to=1.5), "shapes[0].ms falls along active, from 1.5 to 1"),
        (
            _set(*TABLE, to=[[1.0, 5.0, None], [1.0, None, 3.0], [1.0, None, None]]),
            "shapes[0].ms[1][2] is 3, where fewer rows and active experts take 5",
        ),
        (_set(*TABLE, 0, to=[None, None, None]), "shapes[0].ms[0][0] is null"),
        (_set("version", to=True), "has version True"),
        (_set("shapes", 0, "share", to=5), "shapes[0].share must lie in [1e-06, 1], got 5"),
        (_set("shapes", 0, "weights", to=[1]), "shapes[0].weights must be text"),
        (_set("shapes", 0, "top_k", to=17), "shapes[0].top_k is 17, of 16 experts"),
        (_set("hardware", to="fast"), "hardware must be an object, got 'fast'"),
        (_set("step", to=3), "step must be an object"),
        (_set("step", to={"fixed_ms": 1.0, "row_ms": 0.0}), "step.scale is missing"),
        (_set("step", to={"fixed_ms": -1.0, "row_ms": 0.0, "scale": 1}), "step.fixed_ms must lie"),
        (_set("step", to={"fixed_ms": 1.0, "row_ms": 0.0, "scale": 0}), "step.scale must lie"),
    ],
)
def test_damage_is_named(path: Path, change: Callable[[Any], None], named: str) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))
    _refused(path, named)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", '"format" is not "sere-cost"'),
        (b" " * (5 << 20), "is larger than 4 MiB"),
    ],
)
def test_other_files_are_named(path: Path, content: bytes, named: str) -> None:
    path.write_bytes(content)
    _refused(path, named)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    _refused(tmp_path / "absent.json", "no such file")
    _refused(tmp_path, "is not a file")


def _refused(path: Path, named: str) -> None:
    with pytest.raises(SereError) as refusal:
        load_cost(path)
    message = str(refusal.value)
    assert message.startswith(f"--sere-cost {path}: ") and named in message
    assert "sere-sglang doctor --model MODEL --out FILE" in message
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"num_experts": 32}, "experts: file 16, model 32"),
        ({"top_k": 8}, "experts per token: file 4, model 8"),
        ({"layers": (0, 1)}, "MoE layers: file [1, 2, 3], model [0, 1]"),
        ({"fingerprint": "f" * 16}, f"config fingerprint: file {MODEL.fingerprint}, model ffff"),
    ],
)
def test_another_model_is_named(path: Path, other: dict[str, Any], named: str) -> None:
    values: dict[str, Any] = {
        "name": "b/model",
        "fingerprint": MODEL.fingerprint,
        "layers": MODEL.layers,
        "num_experts": 16,
        "top_k": 4,
    }
    with pytest.raises(SereError) as refusal:
        check_cost_fits(load_cost(path), CostModel(**values | other), path)
    message = str(refusal.value)
    assert f"--sere-cost {path} (of a/model) does not fit b/model: {named}" in message
    assert "sere-sglang doctor --model b/model --out FILE" in message
