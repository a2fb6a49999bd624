"""SERE inside one scheduler process: joins the policy, the control block and the stages."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sere_sglang.config import live_settings, quality_rules
from sere_sglang.errors import SereError
from sere_sglang.names import AUTO, RowClass
from sere_sglang.options import SereConfig
from sere_sglang.profile import SereProfile
from sere_sglang.runtime.bind import Binding
from sere_sglang.runtime.brake import Brake
from sere_sglang.runtime.counters import CounterReader
from sere_sglang.runtime.health import Health
from sere_sglang.runtime.measuring import Measuring
from sere_sglang.runtime.publish import publish, publish_exact
from sere_sglang.runtime.service import Service
from sere_sglang.schedule.adaptive import budget_of
from sere_sglang.schedule.composition import BatchComposition, Mode, MoeRows
from sere_sglang.schedule.cost import MoeCost
from sere_sglang.schedule.expectation import expect, statistics_of
from sere_sglang.schedule.feedback import Feedback, first_feedback
from sere_sglang.schedule.point import OFF, OperatingPoint
from sere_sglang.schedule.policy import Policy, PolicyContext, choose
from sere_sglang.schedule.registry import make_policy
from sere_sglang.schedule.request_quality import row_classes
from sere_sglang.schedule.settings import Limits, Settings
from sere_sglang.schedule.shadow import ShadowReport
from sere_sglang.schedule.trace import TraceWriter

logger = logging.getLogger(__name__)

_STARTING = Service(warms_up=True)


class SereRuntime:
    """One per rank, once its weights have loaded. `begin_forward` and `end_forward` bracket every
    forward of the target model.

    Every rank decides by itself, from what all ranks see: composition, settings, feedback. What
    was measured comes from one rank (`Service.measures`) as `Feedback`.
    """

    def __init__(
        self,
        config: SereConfig,
        binding: Binding,
        profile: SereProfile,
        cost: MoeCost,
        moe_rows: MoeRows = MoeRows.OWN,
    ) -> None:
        """config: resolved. binding: of a model that the rule can be had for."""
        self.config = config
        if config.rule == AUTO:
            chosen = binding.auto.settings
            config = dataclasses.replace(config, **{f"sere_{n}": v for n, v in chosen.items()})
            logger.info("--sere-rule auto is %s", binding.auto)
        self.settings = live_settings(config)
        self.quality_rules = quality_rules(config)
        self.binding = binding
        self.moe_rows = moe_rows
        self.context = PolicyContext(expect(statistics_of(profile)), cost, profile.tuning)
        self.context.expectation.of(self.settings.rule)  # now, not in the first decode step
        self.policy = make_policy(self.settings.policy, self.context)
        self.feedback = first_feedback(cost)
        self.point: OperatingPoint = OFF
        self.last: BatchComposition | None = None
        self.health = Health()
        self.brake = Brake()
        self.measuring = Measuring(
            CounterReader(binding.counters, binding.loss_unit),
            self.policy,
            cost,
            self.context.expectation,
        )
        self.service = _STARTING
        self._steps = 0
        self._checked: set[Mode] = set()
        self._captured: set[Mode] = set()
        self._looked_at = 0
        logger.info(
            "SERE on: %d MoE layers, %s kernel, rule %s, policy %s, S=%d, rho=%g, profile %s, %s",
            len(binding.stages),
            binding.impl,
            self.settings.rule,
            self.settings.policy,
            self.settings.primary_k,
            self.settings.threshold,
            config.sere_profile,
            cost,
        )

    def serve(self, service: Service) -> None:
        """The scheduler is up."""
        self.service = service

    def begin_forward(
        self, composition: BatchComposition, request_classes: Sequence[int] = ()
    ) -> None:
        """Choose and publish the operating point of the forward that is about to run."""
        self._steps += 1
        classes = b""
        if composition.is_decode_like and any(request_classes):
            rows = composition.num_tokens // len(request_classes)
            classes = row_classes(request_classes, rows)
        composition = dataclasses.replace(
            composition,
            step=self._steps,
            exact_rows=classes.count(RowClass.EXACT),
            fast_rows=classes.count(RowClass.FAST),
        )
        # A failure in what only some ranks do must not keep this one from deciding like them.
        if self.service.measures:
            self._watched(
                "measuring",
                self.measuring.note_step,
                composition,
                self.last,
                self.point,
                self.settings,
                self.service.metrics,
            )
        self.last = composition
        self.point = choose(self.policy, composition, self.settings, self.feedback)
        self.measuring.note_point(self.point)
        if len(classes) > self.binding.control.max_rows:
            self.point = OFF  # more rows than classes can be told apart for: exact for all
        # Padding that stands among the rows votes like them; behind them it does not.
        num_valid = composition.num_tokens if self.moe_rows is MoeRows.OWN else -1
        publish(self.binding, self.point, num_valid, classes, self.settings)
        trace = self.service.trace
        if trace is not None:
            self._watched("--sere-trace", self._write_trace, trace, composition)

    def end_forward(self, *, failed: bool = False) -> None:
        """failed: it has raised, which nothing here may hide."""
        self.binding.switch.launch, self.binding.switch.rule = True, None
        last = None if failed else self.last
        if last is not None and last.num_tokens and last.mode not in self._checked:
            self._check_layers(last.mode)
        if self.service.measures or self.service.metrics is not None:
            self._watched("telemetry", self._read_counters)

    def _check_layers(self, mode: Mode) -> None:
        """After the first forward of each mode; the replay of a graph runs no stage."""
        if self.binding.any_ran or mode not in self._captured:
            self._require_all_ran(f" ({mode})" if self._checked else "")
        if not self.health.failed:
            self._checked.add(mode)
        self.binding.forget_runs()

    def _require_all_ran(self, where: str) -> None:
        try:
            self.binding.check_all_ran(where)
        except SereError as error:
            if not self.config.falls_back:
                raise
            self.fail("--sere-on-error fallback", error)

    def note_captured(self, size: int | None = None) -> None:
        """CUDA graphs have been captured: one of decoding, of `size` requests, which must hold
        every layer; or those of prefill, which hold none."""
        if size is not None:
            self._require_all_ran(f" in the CUDA graph of batch size {size}")
        self._captured |= {"extend", "mixed"} if size is None else {"decode", "verify"}

    def exact_forward(self) -> None:
        """In place of `begin_forward` where that cannot be had: the coming forward runs exact."""
        self.point = OFF
        publish_exact(self.binding)

    @property
    def is_serving(self) -> bool:
        """From here on nothing may stop the server."""
        warm = bool(self._checked) or self.health.has_failed or not self.service.warms_up
        return self.service is not _STARTING and warm

    def fail(self, where: str, error: Exception) -> None:
        """Something of ours has raised. Warns once, and re-routing ends: at once where there is one
        rank, else when the rank that receives requests has told all of them."""
        reason = self.health.note(where, error, self.service.tells)
        if self.service.tells is None:
            self.stop(reason)

    def stop(self, reason: str) -> None:
        """On every rank between the same two steps: exact from now on."""
        if self.health.failed is not None:
            return
        self.health.end(reason)
        self.point = OFF
        # The control block is written by the next forward, on its own stream.
        self.binding.switch.off()
        if self.service.metrics is not None:
            self.service.metrics.set_failed(True)

    def is_due(self) -> bool:
        """Once for every forward: whether there was one since the last call."""
        before, self._looked_at = self._looked_at, self._steps
        return before != self._steps

    def set_feedback(self, feedback: Feedback) -> None:
        """On every rank, between two steps."""
        self.feedback = feedback

    def note_shadow(self, report: ShadowReport) -> None:
        """On every rank between the same two steps: what re-routing did to users' requests."""
        if self.brake.pulls(report, self.settings):
            self.settings = dataclasses.replace(self.settings, enabled=False)
            if self.service.measures:
                logger.warning(
                    "SERE brakes, serving goes on with exact routing: %s; release it with "
                    '/set_internal_state {"server_args": {"sere": {"enabled": true}}}',
                    self.brake.pulled,
                )
        if self.service.metrics is not None:
            self.service.metrics.set_shadow(report, self.brake.pulled is not None)

    def settings_with(self, changes: Mapping[str, Any]) -> Settings:
        """The settings after `changes`, validated; raises `SereError` and changes nothing."""
        return self.settings.updated(changes, self.limits)

    @property
    def limits(self) -> Limits:
        """Of live settings."""
        return Limits(
            self.top_k,
            self.binding.auto,
            self.binding.unavailable,
            self.binding.num_experts,
            self.binding.has_surrogates,
        )

    def prepared(self, changes: Mapping[str, Any]) -> Callable[[], None]:
        """What applies `changes` of ``/set_internal_state``, everything that can be refused being
        done. Raises `SereError`. ``reset_counters: true`` zeroes them, ``enabled: true`` also
        starts again after a failure."""
        settings = self.settings_with(changes)
        again = changes.get("enabled") is True and self.health.trouble is not None
        self.context.expectation.of(settings.rule)
        policy = None
        if settings.policy != self.settings.policy or again:
            policy = make_policy(settings.policy, self.context)

        def apply() -> None:
            self.settings = settings
            if changes.get("enabled") is True:
                self._release_brake()
            self.measuring.window = None  # of the settings before
            if policy is not None:
                self._take_policy(policy)
            if again:
                self._start_again()
            if changes.get("reset_counters"):
                self.binding.settle()
                self.binding.counters.zero_()
                self.measuring.forget()
            if self.service.trace is not None:
                self.service.trace.flush()
            logger.info("SERE settings: %s", self.settings)

        return apply

    @property
    def top_k(self) -> int:
        return self.binding.top_k

    def budget(self) -> float:
        """Expected loss that the last batch might cost."""
        if self.feedback.budget is not None:
            return self.feedback.budget
        rows = 1 if self.last is None else self.last.num_tokens
        return budget_of(self.context.tuning, self.settings, rows)

    def predicted_ms(self) -> float | None:
        """Step time that the model behind the decisions expects of the last decode batch."""
        if self.last is None or not self.last.is_decode_like:
            return None
        rows = self.last.num_tokens
        active, _ = self.context.expectation.effect(rows, self.point)
        return float(self.feedback.step.step_ms(rows, self.context.cost.moe_ms(rows, active)))

    def _write_trace(self, trace: TraceWriter, composition: BatchComposition) -> None:
        trace.write(
            composition,
            self.point,
            step_ms=self.feedback.step_ms,
            budget=self.budget(),
            spent_loss=self.measuring.spent_loss(self.point),
        )

    def _take_policy(self, policy: Policy) -> None:
        self.policy = policy
        self.feedback = first_feedback(self.context.cost)
        self.measuring.follow(policy)

    def _release_brake(self) -> None:
        self.brake.release()
        if self.service.metrics is not None:
            self.service.metrics.set_braked(False)

    def _start_again(self) -> None:
        self.health.start_again()
        if not self.service.warms_up:
            self._checked.clear()  # a model that cannot be re-routed fails again
        if self.service.metrics is not None:
            self.service.metrics.set_failed(False)

    def _watched(self, where: str, do: Callable[..., None], *args: Any) -> None:
        try:
            do(*args)
        except Exception as error:
            if not self.is_serving:
                raise
            self.fail(where, error)

    def _read_counters(self) -> None:
        window = self.measuring.read_counters()
        metrics, last = self.service.metrics, self.last
        if metrics is None or last is None:
            return
        metrics.count_forward(last.mode, last.num_tokens, self.point.enabled)
        if window is not None:
            metrics.set_window(window)
        self.measuring.report(
            metrics, last, self.point, self.settings, self.budget(), self.predicted_ms
        )
