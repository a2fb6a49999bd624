"""What re-routing can gain at most on this machine, by nothing but bytes and multiplications."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sere_sglang.cpu.floor import Floor, measure_floor
from sere_sglang.schedule.expectation import Expectation
from sere_sglang.schedule.point import OperatingPoint


@dataclass(frozen=True)
class FloorModel:
    """A layer takes at least as long as reading its active experts once, and at least as long as
    multiplying its routed slots at the float32 peak.

    expert_bytes: weights of one expert; slot_operations: two for each of them.
    """

    machine: Floor
    cpu: str
    cores: int
    num_experts: int
    num_layers: int
    top_k: int
    expert_bytes: float
    slot_operations: float

    @classmethod
    def of(cls, model_config: dict[str, Any], hardware: dict[str, Any]) -> FloorModel:
        """For a model with bfloat16 experts; measures the machine in less than a second."""
        weights = 3 * model_config["hidden_size"] * model_config["moe_intermediate_size"]
        experts = model_config["num_hidden_layers"] * model_config["num_experts"]
        return cls(
            machine=measure_floor(working_set=2 * weights * experts),
            cpu=hardware["cpu"],
            cores=hardware["cores"],
            num_experts=model_config["num_experts"],
            num_layers=model_config["num_hidden_layers"],
            top_k=model_config["num_experts_per_tok"],
            expert_bytes=2.0 * weights,
            slot_operations=2.0 * weights,
        )

    def layer_ms(self, rows: float, active: float) -> float:
        """Of one layer with `active` experts over `rows` tokens."""
        operations = 0.0 if self.machine.isa == "amx" else rows * self.top_k * self.slot_operations
        return 1000 * self.machine.seconds(active * self.expert_bytes, operations)

    def limit(
        self, rows: float, active_off: float, active: float, step_ms: float, moe_ms: float
    ) -> float:
        """How much faster than exact routing a whole step can be at most.

        step_ms: of a decode step with exact routing; moe_ms: what its MoE layers take of it. They
        shrink as `layer_ms` does, the rest stays.
        """
        ratio = self.layer_ms(rows, active) / self.layer_ms(rows, active_off)
        return step_ms / (step_ms - min(moe_ms, step_ms) * (1.0 - min(ratio, 1.0)))

    def told(self, expectation: Expectation, levels: list[int]) -> str:
        """For people: this machine, and what the strongest skipping can make of a layer on it."""
        machine = self.machine
        lines = [
            f"this machine: {self.cpu}, {self.cores} cores, {machine.isa}; reads "
            f"{machine.read_gb_s:.1f} GB/s, multiplies {machine.float32_gflop_s:.0f} GFLOP/s "
            "(float32)",
            f"the model: {self.num_layers} MoE layers, {self.num_experts} experts of "
            f"{self.expert_bytes / 1e6:.1f} MB, {self.top_k} per token",
        ]
        strongest = OperatingPoint(True, 1, 0.0)
        gains = []
        for rows in levels:
            plain = expectation.plain_active(rows) / self.num_layers
            active = expectation.effect(rows, strongest)[0] / self.num_layers
            gain = self.layer_ms(rows, plain) / self.layer_ms(rows, active)
            gains.append(f"{rows} streams {plain:.0f} -> {active:.0f} experts, {gain:.1f}x")
        lines.append(f"a layer can gain from S=1 at most: {'; '.join(gains)}")
        return "\n".join(lines)
