"""The cost file: what `sere-sglang doctor` timed, for ``--sere-cost`` and ``simulate --cost``.

JSON, see docs/scheduling.md. A reader refuses what is not finite, falls along an axis, or was made
for another model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from sere_sglang.errors import PATH_SHOWN, SereError, cut
from sere_sglang.files import write_output
from sere_sglang.profile import MoeModelInfo, SereProfile
from sere_sglang.schedule.cost import MoeCost, StepModel
from sere_sglang.schedule.layer_cost import BandwidthCost, LayerCost, LayerShape, MeasuredCost

FORMAT, VERSION = "sere-cost", 1

_MAX_BYTES = 4 << 20
_MAX_LINES = 256  # rows, or columns, of a table
_MAX_MS = 1e6
_MAX_COUNT = 1 << 20


@dataclass(frozen=True)
class CostModel:
    """Whose layers were timed; the fingerprint is `MoeModelInfo.fingerprint`."""

    name: str
    fingerprint: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, model: MoeModelInfo) -> CostModel:
        return cls(model.name, model.fingerprint, model.layer_ids, model.num_experts, model.top_k)

    @classmethod
    def of_profile(cls, profile: SereProfile) -> CostModel:
        meta = profile.metadata
        layers = tuple(sorted(profile.similarity))
        return cls(meta.model, meta.fingerprint, layers, profile.num_experts, meta.top_k)


@dataclass(frozen=True)
class CostFile:
    model: CostModel
    cost: MoeCost


def describe(cost: MoeCost) -> dict[str, Any]:
    """What ``/server_info`` shows and the file holds: tables, where they come from, the hardware.

    ``ms`` is null where nobody measured.
    """
    shapes = []
    for layer, ids in cost.layers:
        entry: dict[str, Any] = {"layers": list(ids), **asdict(layer.shape)}
        if isinstance(layer, MeasuredCost):
            entry["rows"], entry["active"] = list(layer.rows), list(layer.active)
            entry["ms"] = [
                [float(f"{ms:.6g}") if timed else None for ms, timed in zip(*line, strict=True)]
                for line in zip(layer.ms, layer.timed, strict=True)
            ]
        elif isinstance(layer, BandwidthCost):
            entry["expert_ms"], entry["slot_ms"] = layer.expert_ms, layer.slot_ms
        shapes.append(entry)
    return {
        "source": cost.source,
        "reason": cost.reason,
        "seconds": round(cost.seconds, 3),
        "hardware": dict(cost.hardware),
        "shapes": shapes,
        "step": None if cost.step is None else asdict(cost.step),
    }


def described(told: Mapping[str, Any]) -> MoeCost:
    """What `describe` told, for instance through ``/server_info``."""
    layers: list[tuple[LayerCost, tuple[int, ...]]] = []
    for entry in told["shapes"]:
        shape = LayerShape(**{f.name: entry[f.name] for f in fields(LayerShape)})
        layer: LayerCost
        if "ms" in entry:
            ms = np.array(entry["ms"], dtype=np.float64)  # null becomes NaN
            layer = MeasuredCost.fit(shape, entry["rows"], entry["active"], ms)
        else:
            layer = BandwidthCost(shape, entry["expert_ms"], entry["slot_ms"])
        layers.append((layer, tuple(entry["layers"])))
    return MoeCost(tuple(layers), source=told["source"])


def save_cost(path: Path, model: CostModel, cost: MoeCost) -> None:
    """Only of measured tables. Raises `SereError`."""
    told = describe(cost)
    body = {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(model),
        "hardware": told["hardware"],
        "shapes": told["shapes"],
    }
    if cost.step is not None:
        body["step"] = told["step"]
    write_output(path, json.dumps(body, indent=1) + "\n")


def load_cost(path: str | Path, flag: str = "--sere-cost") -> CostFile:
    """Raises `SereError`, naming the flag, the file, what is wrong in it and the fix."""
    read = _Reader(f"{flag} {cut(str(path), PATH_SHOWN)}")
    body = read.json(Path(path))
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        read.refuse(f'is not a cost file ("format" is not "{FORMAT}")')
    if type(body.get("version")) is not int or body["version"] != VERSION:
        read.refuse(f"has version {_short(body.get('version'))}, this sere-sglang reads {VERSION}")
    model = read.model(read.entry(body, "model", dict))
    shapes = [
        read.shape(shape, f"shapes[{i}]")
        for i, shape in enumerate(read.entry(body, "shapes", list))
    ]
    held = sorted(layer for _, ids in shapes for layer in ids)
    if held != sorted(model.layers):
        read.refuse(
            f"shapes are of layers {_short(held)}, the model has {_short(sorted(model.layers))}"
        )
    for cost, _ in shapes:
        if cost.shape.top_k != model.top_k or cost.shape.num_experts < model.num_experts:
            read.refuse(
                f"a shape has {cost.shape.num_experts} experts, top-{cost.shape.top_k}; the model "
                f"{model.num_experts}, top-{model.top_k}"
            )
    step = read.step(body["step"]) if body.get("step") is not None else None
    hardware = read.hardware(body.get("hardware"))
    return CostFile(
        model,
        MoeCost(
            tuple(shapes),
            source="file",
            hardware=hardware,
            step=step,
        ),
    )


def check_cost_fits(
    file: CostFile, model: CostModel, path: str | Path, flag: str = "--sere-cost"
) -> None:
    """Raise `SereError`, with both sides, unless it was made for this model's shape."""
    sides = [
        ("experts", file.model.num_experts, model.num_experts),
        ("experts per token", file.model.top_k, model.top_k),
        ("MoE layers", list(file.model.layers), list(model.layers)),
        ("config fingerprint", file.model.fingerprint, model.fingerprint),
    ]
    wrong = [
        f"{what}: file {_plain(held)}, model {_plain(own)}"
        for what, held, own in sides
        if held and own and held != own
    ]
    if wrong:
        raise SereError(
            f"{flag} {path} (of {file.model.name or 'an unnamed model'}) does not fit "
            f"{model.name}: {'; '.join(wrong)}. Time this model's layers: {_fix(model.name)}"
        )


def _fix(model: str = "MODEL") -> str:
    return f"sere-sglang doctor --model {model} --out FILE"


def _short(value: Any) -> str:
    text = repr(value)
    return cut(text, 80)


def _plain(value: Any) -> str:
    return value[:80] if isinstance(value, str) else _short(value)


class _Reader:
    """Takes a file's values out of untrusted JSON; `name` stands before every refusal."""

    def __init__(self, name: str) -> None:
        self.name = name

    def refuse(self, what: str) -> NoReturn:
        raise SereError(f"{self.name}: {what}; write one with '{_fix()}'")

    def json(self, path: Path) -> Any:
        try:
            if not path.is_file():
                self.refuse("is not a file" if path.exists() else "no such file")
            with path.open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except OSError as error:
            self.refuse(f"cannot be read ({error.strerror or error})")
        if len(content) > _MAX_BYTES:
            self.refuse(f"is larger than {_MAX_BYTES >> 20} MiB, no cost file is")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            self.refuse(f"is not JSON ({str(error)[:80]})")

    def entry(self, holder: Any, key: str, kind: type, where: str = "") -> Any:
        value = holder.get(key) if isinstance(holder, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            what = "is missing" if value is None else f"must be {_KINDS[kind]}"
            self.refuse(f"{where}{key} {what}")
        return value

    def model(self, entry: dict[str, Any]) -> CostModel:
        return CostModel(
            name=self.entry(entry, "name", str, "model."),
            fingerprint=self.entry(entry, "fingerprint", str, "model."),
            layers=self.counts(entry, "layers", "model.", least=0, most_entries=_MAX_COUNT),
            num_experts=self.count(entry, "num_experts", "model."),
            top_k=self.count(entry, "top_k", "model."),
        )

    def shape(self, entry: Any, where: str) -> tuple[MeasuredCost, tuple[int, ...]]:
        where = f"{where}."
        shape = LayerShape(
            num_experts=self.count(entry, "num_experts", where),
            top_k=self.count(entry, "top_k", where),
            hidden_size=self.size(entry, "hidden_size", where),
            intermediate_size=self.size(entry, "intermediate_size", where),
            weights=self.text(entry, "weights", where),
            expert_bytes=self.about(entry, "expert_bytes", where, 0.0),
            slot_flops=self.about(entry, "slot_flops", where, 0.0),
            share=self.number(entry.get("share", 1.0), f"{where}share", least=1e-6, most=1.0),
        )
        if shape.top_k > shape.num_experts:
            self.refuse(f"{where}top_k is {shape.top_k}, of {shape.num_experts} experts")
        layers = self.counts(entry, "layers", where, least=0, most_entries=_MAX_COUNT)
        rows = self.counts(entry, "rows", where)
        active = self.counts(entry, "active", where)
        if active[-1] > shape.num_experts:
            self.refuse(
                f"{where}active goes to {active[-1]}, the layer has {shape.num_experts} experts"
            )
        ms = self.table(self.entry(entry, "ms", list, where), len(rows), len(active), where)
        return MeasuredCost.fit(shape, rows, active, ms), layers

    def table(self, lines: list[Any], rows: int, columns: int, where: str) -> np.ndarray:
        """float64 ``[rows, columns]``, NaN where the file has null."""
        if len(lines) != rows or any(not isinstance(x, list) or len(x) != columns for x in lines):
            self.refuse(f"{where}ms must have a line for each of {rows} rows, each with {columns}")
        ms = np.full((rows, columns), np.nan)
        for r, line in enumerate(lines):
            for c, value in enumerate(line):
                if value is not None:
                    name = f"{where}ms[{r}][{c}]"
                    ms[r, c] = self.number(value, name, least=1e-9, most=_MAX_MS)
        for axis, along in ((0, "rows"), (1, "active")):
            for line in np.moveaxis(ms, axis, -1):
                there = line[np.isfinite(line)]
                falls = next((pair for pair in pairwise(there) if pair[1] < pair[0]), None)
                if falls is not None:
                    self.refuse(
                        f"{where}ms falls along {along}, from {falls[0]:g} to {falls[1]:g}: more "
                        "never takes less time"
                    )
        if not np.isfinite(ms[0, 0]):
            self.refuse(f"{where}ms[0][0] is null: the first column must be there")
        # The same of two cells that share neither, between which some are null.
        most = np.fmax.accumulate(np.fmax.accumulate(ms, axis=0), axis=1)
        for r, c in np.argwhere(ms < most):
            self.refuse(
                f"{where}ms[{r}][{c}] is {ms[r, c]:g}, where fewer rows and active experts take "
                f"{most[r, c]:g}: more never takes less time"
            )
        return ms

    def step(self, entry: Any) -> StepModel:
        if not isinstance(entry, dict):
            self.refuse("step must be an object")
        for key in ("fixed_ms", "row_ms", "scale"):
            if key not in entry:
                self.refuse(f"step.{key} is missing")
        return StepModel(
            fixed_ms=self.number(entry["fixed_ms"], "step.fixed_ms", most=_MAX_MS),
            row_ms=self.number(entry["row_ms"], "step.row_ms", most=_MAX_MS),
            scale=self.number(entry["scale"], "step.scale", least=1e-6, most=1e6),
        )

    def hardware(self, entry: Any) -> dict[str, Any]:
        """Told for people only, by ``/server_info``, whose JSON has no NaN."""
        if entry is not None and not isinstance(entry, dict):
            self.refuse(f"hardware must be an object, got {_short(entry)}")
        try:
            json.dumps(entry, allow_nan=False)
        except ValueError:
            self.refuse("hardware holds what is not a number")
        return entry or {}

    def number(self, value: Any, where: str, *, least: float = 0.0, most: float) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(f"{where} must be a number, got {_short(value)}")
        # Comparing is false for NaN and works for whole numbers that no float can hold.
        if not least <= value <= most:
            self.refuse(f"{where} must lie in [{least:g}, {most:g}], got {_short(value)}")
        return float(value)

    def size(self, holder: dict[str, Any], key: str, where: str) -> int:
        """Told for people only; a file may leave it out."""
        return self.count(holder, key, where) if holder.get(key) else 0

    def text(self, holder: dict[str, Any], key: str, where: str) -> str:
        """The same, words."""
        return self.entry(holder, key, str, where) if key in holder else ""

    def about(self, holder: dict[str, Any], key: str, where: str, default: float) -> float:
        """The same, not whole."""
        return self.number(holder.get(key, default), f"{where}{key}", most=1e18)

    def count(self, holder: Any, key: str, where: str) -> int:
        value: int = self.entry(holder, key, int, where)
        if not 1 <= value <= _MAX_COUNT:
            self.refuse(f"{where}{key} must lie in [1, {_MAX_COUNT}], got {_short(value)}")
        return value

    def counts(
        self, holder: Any, key: str, where: str, *, least: int = 1, most_entries: int = _MAX_LINES
    ) -> tuple[int, ...]:
        values = self.entry(holder, key, list, where)
        if not 1 <= len(values) <= most_entries:
            self.refuse(f"{where}{key} must have 1 to {most_entries} entries, has {len(values)}")
        for value in values:
            if type(value) is not int or not least <= value <= _MAX_COUNT:
                self.refuse(f"{where}{key} must be whole numbers from {least}, got {_short(value)}")
        if any(b <= a for a, b in pairwise(values)):
            self.refuse(f"{where}{key} must ascend")
        return tuple(values)


_KINDS = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
