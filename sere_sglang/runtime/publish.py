"""How what a forward runs at reaches the layers: the control block on the device, and what the host
reads of it."""

from __future__ import annotations

import torch

from sere_sglang.names import SIMILARITY
from sere_sglang.runtime.bind import Binding
from sere_sglang.runtime.rule_stage import RuleForward
from sere_sglang.schedule.point import OFF, OperatingPoint
from sere_sglang.schedule.settings import Settings


def publish(
    binding: Binding, point: OperatingPoint, num_valid: int, classes: bytes, settings: Settings
) -> None:
    """Before a forward. classes: a `RowClass` for each valid row, empty when all are balanced;
    num_valid: as `ControlBlock.write`."""
    exact = (binding.top_k, 0.0)
    fast = (settings.fast_primary_k, settings.fast_threshold)
    binding.control.write(
        point,
        num_valid,
        classes,
        (exact, fast) if classes else (),  # in the order of RowClass
        fast_keep=settings.fast_primary_k,
        surrogates=settings.surrogates,
    )
    binding.switch.launch, binding.switch.rule = point.enabled, None
    if point.enabled and point.rule != SIMILARITY:
        rows = torch.frombuffer(bytearray(classes), dtype=torch.uint8) if classes else None
        binding.switch.rule = RuleForward(
            point, num_valid, rows, settings.fast_primary_k, settings.surrogates
        )


def publish_exact(binding: Binding) -> None:
    """Before a forward that nothing may re-route."""
    binding.control.write(OFF, 0)
    binding.switch.off()
