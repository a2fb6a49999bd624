"""Prometheus metrics, on SGLang's own ``/metrics`` when the server has ``--enable-metrics``.

Names and values are in base units (seconds), as Prometheus asks for and as SGLang's are; the rest
of this package counts milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sere_sglang.names import RULES, policy_names
from sere_sglang.runtime.counters import Window
from sere_sglang.schedule.point import OperatingPoint
from sere_sglang.schedule.settings import Settings
from sere_sglang.schedule.shadow import ShadowReport

PREFIX = "sglang:sere_"
# fmt: off
_STEP_BUCKETS = (
    .0005, .001, .002, .004, .006, .008, .01, .015, .02, .03, .04, .06, .08, .12, .2, .4, 1.0,
)
# fmt: on
_EXPERT_BUCKETS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class SereMetrics:
    """One per reporting rank; `labels` are the ones SGLang puts on its scheduler metrics."""

    def __init__(self, labels: Mapping[str, str], layer_ids: Sequence[int]) -> None:
        # SGLang sets PROMETHEUS_MULTIPROC_DIR before this may be imported.
        from prometheus_client import Counter, Gauge, Histogram

        self._labels = dict(labels)
        self._layers = [str(layer) for layer in layer_ids]
        names = list(labels)

        def gauge(name: str, text: str, *extra: str) -> Any:
            return Gauge(
                PREFIX + name, text, labelnames=[*names, *extra], multiprocess_mode="mostrecent"
            )

        self._primary_k = gauge("primary_k", "S of the last decode step, mean of layers; 0: exact.")
        self._failed = gauge("failed", "1 when re-routing has stopped after an error of SERE's.")
        self._threshold = gauge("threshold", "rho of the last decode step.")
        self._allowed = gauge(
            "allowed_loss", "What rule energy might drop in the last decode step."
        )
        self._rule = gauge("rule", "1 for the rule in force; none when off.", "rule")
        self._budget = gauge("quality_budget", "Expected loss that the policy may spend.")
        self._policy = gauge("policy", "1 for the policy that decides; none when off.", "policy")
        self._target = gauge("tpot_slo_seconds", "Target of the slo policy; 0 without one.")
        self._predicted = gauge("predicted_step_seconds", "Decode step time the policy expected.")
        self._step = gauge("step_seconds", "Measured time per decode step, smoothed.")
        self._before = gauge("active_experts_before", "Mean experts the routers chose.", "layer")
        self._after = gauge("active_experts_after", "Mean experts executed.", "layer")
        self._rerouted = gauge("rerouted_slots", "Mean slots moved per forward.", "layer")
        self._critical = gauge("critical_slots", "Mean slots kept as critical.", "layer")
        self._loss = gauge(
            "loss",
            "Mean of what rules beside similarity dropped, of a row's squared weight.",
            "layer",
        )
        self._shadow_kl = gauge(
            "shadow_kl", "KL(exact || served) of finished requests, at least; nats per token."
        )
        self._shadow_low = gauge("shadow_kl_low", "Lower end of its interval; the brake's figure.")
        self._max_kl = gauge("max_kl", "Where the brake goes exact; 0 without one.")
        self._braked = gauge("braked", "1 when the brake has switched re-routing off.")
        self._shadow_tokens = gauge("shadow_tokens", "Tokens compared since the start.")
        self._shadow_requests = gauge(
            "shadow_requests", "Requests compared, failed or dropped since the start.", "outcome"
        )
        self._forwards = Counter(
            PREFIX + "forwards_total",
            "Forwards of the target model.",
            labelnames=[*names, "mode", "rerouted"],
        )
        self._rows = Histogram(
            PREFIX + "batch_rows",
            "Rows per forward.",
            labelnames=[*names, "mode"],
            buckets=tuple(2**i for i in range(14)),
        )
        self._active = Histogram(
            PREFIX + "active_experts",
            "Experts executed per layer and re-routed forward, means of short windows.",
            labelnames=names,
            buckets=_EXPERT_BUCKETS,
        )
        self._tpot = Histogram(
            PREFIX + "tpot_seconds",
            "Time from one decode step to the next.",
            labelnames=names,
            buckets=_STEP_BUCKETS,
        )
        self.set_failed(False)
        self.set_shadow(ShadowReport(), braked=False)

    def set_failed(self, failed: bool) -> None:
        self._failed.labels(**self._labels).set(failed)

    def set_braked(self, braked: bool) -> None:
        self._braked.labels(**self._labels).set(braked)

    def set_shadow(self, report: ShadowReport, braked: bool) -> None:
        self._shadow_kl.labels(**self._labels).set(report.kl)
        self._shadow_low.labels(**self._labels).set(report.low)
        self._shadow_tokens.labels(**self._labels).set(report.tokens)
        for outcome in ("requests", "failed", "dropped"):
            name = "compared" if outcome == "requests" else outcome
            labels = {**self._labels, "outcome": name}
            self._shadow_requests.labels(**labels).set(getattr(report, outcome))
        self.set_braked(braked)

    def count_forward(self, mode: str, rows: int, rerouted: bool) -> None:
        self._forwards.labels(**self._labels, mode=mode, rerouted=str(rerouted).lower()).inc()
        self._rows.labels(**self._labels, mode=mode).observe(rows)

    def observe_step(self, elapsed_ms: float, smoothed_ms: float) -> None:
        self._tpot.labels(**self._labels).observe(elapsed_ms / 1000)
        self._step.labels(**self._labels).set(smoothed_ms / 1000)

    def set_policy(self, settings: Settings) -> None:
        for name in policy_names():
            chosen = settings.enabled and name == settings.policy
            self._policy.labels(**self._labels, policy=name).set(chosen)
        for name in RULES:
            chosen = settings.enabled and name == settings.rule
            self._rule.labels(**self._labels, rule=name).set(chosen)
        self._target.labels(**self._labels).set((settings.tpot_slo_ms or 0.0) / 1000)
        self._max_kl.labels(**self._labels).set(settings.max_kl or 0.0)

    def set_point(self, point: OperatingPoint, budget: float, predicted_ms: float | None) -> None:
        self._primary_k.labels(**self._labels).set(point.mean_primary_k)
        self._threshold.labels(**self._labels).set(point.threshold if point.enabled else 0.0)
        self._allowed.labels(**self._labels).set(point.mean_loss if point.enabled else 0.0)
        self._budget.labels(**self._labels).set(budget)
        if predicted_ms is not None:
            self._predicted.labels(**self._labels).set(predicted_ms / 1000)

    def set_window(self, window: Window) -> None:
        for i, layer in enumerate(self._layers):
            labels = {**self._labels, "layer": layer}
            self._before.labels(**labels).set(window.active_before[i])
            self._after.labels(**labels).set(window.active_after[i])
            self._rerouted.labels(**labels).set(window.rerouted[i])
            self._critical.labels(**labels).set(window.critical[i])
            self._loss.labels(**labels).set(window.loss[i])
            self._active.labels(**self._labels).observe(window.active_after[i])
