"""SERE inside one scheduler process: joins the policy, the control block and the stages."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sere_sglang.config import SereConfig
from sere_sglang.ops import COUNTER_FIELDS
from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.policy import OFF, OperatingPoint, Settings, static_policy

if TYPE_CHECKING:
    from sere_sglang.backend.bind import Binding

logger = logging.getLogger(__name__)

_current: SereRuntime | None = None


class SereRuntime:
    """One per rank. `begin_forward` / `end_forward` bracket every forward of the target model."""

    def __init__(self, config: SereConfig) -> None:
        assert config.sere_primary_k is not None and config.sere_threshold is not None
        assert config.sere_min_batch is not None
        self.config = config
        self.settings = Settings(
            enabled=True,
            primary_k=config.sere_primary_k,
            threshold=config.sere_threshold,
            min_batch=config.sere_min_batch,
            max_batch=config.sere_max_batch,
        )
        self.binding: Binding | None = None
        self.point: OperatingPoint = OFF
        self.last: BatchComposition | None = None
        self._checked = False

    def attach(self, binding: Binding) -> None:
        self.binding = binding
        logger.info(
            "SERE on: %d MoE layers, %s kernel, policy %s, S=%d, rho=%g, profile %s",
            len(binding.stages),
            binding.impl,
            self.config.sere_policy,
            self.settings.primary_k,
            self.settings.threshold,
            self.config.sere_profile,
        )

    def begin_forward(self, composition: BatchComposition) -> None:
        """Choose and publish the operating point of the forward that is about to run."""
        assert self.binding is not None
        self.last = composition
        self.point = static_policy(composition, self.settings)
        self.binding.control.write(self.point, composition.num_tokens)
        self.binding.switch.launch = self.point.enabled

    def end_forward(self) -> None:
        assert self.binding is not None
        self.binding.switch.launch = True
        if not self._checked and self.last is not None and self.last.num_tokens:
            self.binding.check_all_ran()
            self._checked = True

    def settings_with(self, changes: Mapping[str, Any]) -> Settings:
        """The settings after `changes`, validated; raises `SereError` and changes nothing."""
        return self.settings.updated(changes, top_k=self.top_k)

    def update(self, changes: Mapping[str, Any]) -> None:
        """Apply `changes` of ``/set_internal_state``; ``reset_counters: true`` zeroes them."""
        self.settings = self.settings_with(changes)
        if changes.get("reset_counters") and self.binding is not None:
            self.binding.counters.zero_()
        logger.info("SERE settings: %s", self.settings)

    @property
    def top_k(self) -> int:
        return self.binding.stages[0].top_k if self.binding is not None else 1 << 30

    def describe(self) -> dict[str, Any]:
        """What does not change while the server runs; shown in ``/server_info``."""
        assert self.binding is not None
        return {
            "profile": self.config.sere_profile,
            "policy": self.config.sere_policy,
            "layers": self.binding.layer_ids,
            "kernel": self.binding.impl,
        }

    def state(self) -> dict[str, Any]:
        """Live state: settings, the last operating point, counters since start or reset."""
        assert self.binding is not None
        rows = self.binding.counters.tolist()
        return {
            **dataclasses.asdict(self.settings),
            "top_k": self.top_k,
            "operating_point": dataclasses.asdict(self.point),
            "counters": {
                str(layer): dict(zip(COUNTER_FIELDS, row, strict=True))
                for layer, row in zip(self.binding.layer_ids, rows, strict=True)
            },
        }


def start(config: SereConfig) -> SereRuntime:
    """Create this process's runtime (before the scheduler is built)."""
    global _current
    _current = SereRuntime(config)
    return _current


def current() -> SereRuntime | None:
    """This process's runtime; None when it does not run SERE."""
    return _current
