"""SERE inside one scheduler process: joins the policy, the control block and the stages."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sere_sglang.config import live_settings, quality_rules
from sere_sglang.errors import SereError, cut
from sere_sglang.names import RowClass
from sere_sglang.options import SereConfig
from sere_sglang.profile import SereProfile
from sere_sglang.runtime.clock import StepClock
from sere_sglang.runtime.control import ClassTable
from sere_sglang.runtime.counters import CounterReader, Window
from sere_sglang.runtime.rule_stage import RuleForward
from sere_sglang.schedule.composition import BatchComposition, MoeRows
from sere_sglang.schedule.cost import MoeCost
from sere_sglang.schedule.expectation import expect, statistics_of
from sere_sglang.schedule.feedback import NO_FEEDBACK, Feedback, first_feedback
from sere_sglang.schedule.observer import Observer
from sere_sglang.schedule.point import OFF, SIMILARITY, OperatingPoint
from sere_sglang.schedule.policy import Policy, PolicyContext, choose
from sere_sglang.schedule.registry import make_policy
from sere_sglang.schedule.request_quality import row_classes
from sere_sglang.schedule.settings import Settings
from sere_sglang.schedule.trace import TraceWriter

if TYPE_CHECKING:
    from sere_sglang.runtime.bind import Binding
    from sere_sglang.runtime.metrics import SereMetrics

logger = logging.getLogger(__name__)

_REASON = 300  # letters of why it failed, in /server_info
_REPORT_EVERY = 16  # decode steps between two looks at an operating point that stays

_current: SereRuntime | None = None


class SereRuntime:
    """One per rank. `begin_forward` / `end_forward` bracket every forward of the target model.

    Every rank decides by itself, from what all ranks see: composition, settings, feedback. What
    was measured comes from one rank (`measures`) as `Feedback`.

    trouble: why this rank could not go on, set by the first `fail`. failed: why all ranks have
        stopped re-routing, set by `stop` at the same step everywhere; with one rank both at once.
    window: what the counters said last of the operating point that is in force.
    attempt: counts how often an operator has started it again after a failure.
    """

    def __init__(self, config: SereConfig) -> None:
        self.config = config
        self.settings = live_settings(config)
        self.quality_rules = quality_rules(config)
        self.binding: Binding | None = None
        self.policy: Policy | None = None
        self.context: PolicyContext | None = None
        self.point: OperatingPoint = OFF
        self.last: BatchComposition | None = None
        self.feedback: Feedback = NO_FEEDBACK
        self.window: Window | None = None
        self.metrics: SereMetrics | None = None
        self.measures = False
        self.moe_rows = MoeRows.OWN
        self.queue: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._trace: TraceWriter | None = None
        self._clock = StepClock()
        self._outbox: Feedback | None = None
        self._reported: OperatingPoint | None = None
        self._steps = 0
        self._counted, self._at_point = OFF, 0  # the last point that was counted, and how often
        self._checked = False
        self.trouble: str | None = None
        self.failed: str | None = None
        self.attempt = 0
        self.tells: Callable[[str], None] | None = None
        self._serves = False
        self._warms_up = False
        self._looked_at = 0

    def attach(self, binding: Binding, profile: SereProfile, cost: MoeCost) -> None:
        """After the weights have loaded."""
        self.binding = binding
        try:
            self.settings.require_rule(binding.unavailable)
        except SereError as error:
            raise SereError(f"--sere-rule {self.settings.rule}: {error}") from None
        self.context = PolicyContext(expect(statistics_of(profile)), cost)
        self.context.expectation.of(self.settings.rule)  # now, not in the first decode step
        self._reader = CounterReader(binding.counters, binding.squared_mass)
        self._take_policy(make_policy(self.settings.policy, self.context))
        logger.info(
            "SERE on: %d MoE layers, %s kernel, rule %s, policy %s, S=%d, rho=%g, profile %s, %s",
            len(binding.stages),
            binding.impl,
            self.settings.rule,
            self.settings.policy,
            self.settings.primary_k,
            self.settings.threshold,
            self.config.sere_profile,
            cost,
        )

    def start_serving(
        self,
        *,
        queue: Callable[[], tuple[int, int]],
        measures: bool,
        metrics: SereMetrics | None,
        trace_suffix: str = "",
        warms_up: bool = False,
        tells: Callable[[str], None] | None = None,
    ) -> None:
        """Once the scheduler is up.

        Args:
            queue: its running and waiting requests.
            measures: this is the rank that receives requests.
            metrics: where it reports, if it does.
            trace_suffix: of this rank's ``--sere-trace`` file.
            warms_up: the first forward belongs to the start: what fails in it stops the server.
            tells: tells the rank that receives requests of trouble; None when there is one rank.
        """
        self._warms_up, self.tells, self._serves = warms_up, tells, True
        self.queue, self.measures, self.metrics = queue, measures, metrics
        if self.config.sere_trace is not None:
            self._trace = TraceWriter(self.config.sere_trace + trace_suffix)

    def begin_forward(
        self, composition: BatchComposition, request_classes: Sequence[int] = ()
    ) -> None:
        """Choose and publish the operating point of the forward that is about to run."""
        assert self.binding is not None and self.policy is not None
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
        if self.measures:
            self._watched("measuring", self._measure, composition)
        self.last = composition
        self.point = choose(self.policy, composition, self.settings, self.feedback)
        if self.point.enabled:
            if self.point != self._counted:
                self._counted, self._at_point, self.window = self.point, 0, None
            self._at_point += 1
        if len(classes) > self.binding.control.max_rows:
            self.point = OFF  # more rows than classes can be told apart for: exact for all
        # Padding that stands among the rows votes like them; behind them it does not.
        num_valid = composition.num_tokens if self.moe_rows is MoeRows.OWN else -1
        self.binding.control.write(
            self.point, num_valid, classes, self._class_table() if classes else ()
        )
        self.binding.switch.launch = self.point.enabled
        self.binding.switch.rule = self._rule_forward(num_valid, classes)
        if self._trace is not None:
            self._watched("--sere-trace", self._trace.write, composition, self.point, self.feedback)

    def end_forward(self) -> None:
        assert self.binding is not None
        self.binding.switch.launch, self.binding.switch.rule = True, None
        if not self._checked and self.last is not None and self.last.num_tokens:
            self.binding.check_all_ran()
            self._checked = True
        if self.measures or self.metrics is not None:
            self._watched("telemetry", self._read_counters)

    def _rule_forward(self, num_valid: int, classes: bytes) -> RuleForward | None:
        """What the stages apply instead of re-routing by similarity."""
        if not self.point.enabled or self.point.rule == SIMILARITY:
            return None
        rows = torch.frombuffer(bytearray(classes), dtype=torch.uint8) if classes else None
        settings = self.settings
        return RuleForward(
            self.point, num_valid, rows, settings.fast_primary_k, settings.surrogates
        )

    def exact_forward(self) -> None:
        """In place of `begin_forward` where that cannot be had: the coming forward runs exact."""
        if self.binding is not None:
            self.point = OFF
            self.binding.control.write(OFF, 0)
            self.binding.switch.off()

    @property
    def is_serving(self) -> bool:
        """From here on nothing may stop the server."""
        return self._serves and (self._checked or not self._warms_up)

    def fail(self, where: str, error: Exception) -> None:
        """Something of ours has raised. Warns once, and re-routing ends: at once where there is one
        rank, else when the rank that receives requests has told all of them."""
        if self.trouble is None:
            self.trouble = cut(f"{where}: {type(error).__name__}: {error}", _REASON)
            logger.warning(
                "SERE failed and serving goes on with exact routing; start it again with "
                '/set_internal_state {"server_args": {"sere": {"enabled": true}}} (%s)',
                self.trouble,
                exc_info=error,
            )
            if self.tells is not None:
                self.tells(self.trouble)
        if self.tells is None:
            self.stop(self.trouble)

    def stop(self, reason: str) -> None:
        """On every rank between the same two steps: exact from now on."""
        if self.failed is not None:
            return
        if self.trouble is None:
            logger.warning("SERE stops, serving goes on with exact routing: %s", reason)
        self.trouble = self.failed = reason
        self.point = OFF
        if self.binding is not None:
            # The control block is written by the next forward, on its own stream.
            self.binding.switch.off()
        if self.metrics is not None:
            self.metrics.set_failed(True)

    def is_due(self) -> bool:
        """Once for every forward: whether there was one since the last call."""
        before, self._looked_at = self._looked_at, self._steps
        return before != self._steps

    def take_feedback(self) -> Feedback | None:
        """What the measuring rank has concluded since the last call, for all ranks."""
        outbox, self._outbox = self._outbox, None
        return outbox

    def set_feedback(self, feedback: Feedback) -> None:
        """On every rank, between two steps."""
        self.feedback = feedback

    def settings_with(self, changes: Mapping[str, Any]) -> Settings:
        """The settings after `changes`, validated; raises `SereError` and changes nothing."""
        unavailable = self.binding.unavailable if self.binding is not None else {}
        return self.settings.updated(changes, top_k=self.top_k, unavailable=unavailable)

    def prepared(self, changes: Mapping[str, Any]) -> Callable[[], None]:
        """What applies `changes` of ``/set_internal_state``, everything that can be refused being
        done. Raises `SereError`. ``reset_counters: true`` zeroes them, ``enabled: true`` also
        starts again after a failure."""
        settings = self.settings_with(changes)
        again = changes.get("enabled") is True and self.trouble is not None
        if self.context is not None:
            self.context.expectation.of(settings.rule)
        policy = None
        if settings.policy != self.settings.policy or again:
            assert self.context is not None
            policy = make_policy(settings.policy, self.context)

        def apply() -> None:
            self.settings = settings
            self.window = None  # of the settings before
            if policy is not None:
                self._take_policy(policy)
            if again:
                self._start_again()
            if changes.get("reset_counters") and self.binding is not None:
                self.binding.counters.zero_()
                self._reader.forget()
            if self._trace is not None:
                self._trace.flush()
            logger.info("SERE settings: %s", self.settings)

        return apply

    @property
    def top_k(self) -> int:
        return self.binding.stages[0].top_k if self.binding is not None else 1 << 30

    @property
    def step_ms(self) -> float | None:
        """Measured time per decode step, smoothed."""
        return self._clock.step_ms

    def _take_policy(self, policy: Policy) -> None:
        assert self.context is not None
        self.policy = policy
        self.feedback = first_feedback(self.context.cost)
        self._observer = Observer(self.policy, self.context.cost)

    def _start_again(self) -> None:
        self.trouble = self.failed = None
        self.attempt += 1
        self._checked = self._warms_up  # a model that cannot be re-routed fails again
        if self.metrics is not None:
            self.metrics.set_failed(False)

    def _watched(self, where: str, do: Callable[..., None], *args: Any) -> None:
        try:
            do(*args)
        except Exception as error:
            if not self.is_serving:
                raise
            self.fail(where, error)

    def _class_table(self) -> ClassTable:
        fast = (self.settings.fast_primary_k, self.settings.fast_threshold)
        return ((self.top_k, 0.0), fast)  # of RowClass.EXACT and RowClass.FAST

    def _measure(self, composition: BatchComposition) -> None:
        """The launch of this step ends the previous one."""
        elapsed = self._clock.tick(
            is_decode_like=composition.is_decode_like, after_idle=composition.after_idle
        )
        if elapsed is None or self.last is None or self.context is None:
            return
        expected, _ = self.context.expectation.effect(self.last.num_tokens, self.point)
        feedback = self._observer.note_step(elapsed, self.last, expected, self.settings)
        if feedback is not None:
            self._outbox = feedback
        if self.metrics is not None:
            assert self._clock.step_ms is not None
            self.metrics.observe_step(elapsed, self._clock.step_ms)

    def _read_counters(self) -> None:
        assert self.last is not None
        window = self._reader.poll()
        if window is not None:
            # Not what was counted at other points.
            self.window = window if window.forwards <= self._at_point else None
            self._observer.note_active(float(window.active_after.sum()))
        if self.metrics is not None:
            self.metrics.count_forward(self.last.mode, self.last.num_tokens, self.point.enabled)
            if window is not None:
                self.metrics.set_window(window)
            changed = self.point != self._reported or self._steps % _REPORT_EVERY == 0
            if changed and self.last.is_decode_like:
                self._reported = self.point
                budget = self.feedback.budget
                self.metrics.set_point(
                    self.point,
                    self.settings.quality_budget if budget is None else budget,
                    self.predicted_ms(),
                )
                self.metrics.set_policy(self.settings)

    def predicted_ms(self) -> float | None:
        """Step time that the model behind the decisions expects of the last decode batch."""
        if self.context is None or self.last is None or not self.last.is_decode_like:
            return None
        rows = self.last.num_tokens
        active, _ = self.context.expectation.effect(rows, self.point)
        return float(self.feedback.step.step_ms(rows, self.context.cost.moe_ms(rows, active)))


def start(config: SereConfig) -> SereRuntime:
    """Create this process's runtime (before the scheduler is built)."""
    global _current
    _current = SereRuntime(config)
    return _current


def current() -> SereRuntime | None:
    """This process's runtime; None when it does not run SERE."""
    return _current
