"""Every option, once: dataclass field -> CLI flag -> ``sglang.Engine`` keyword.

The parsed config rides on SGLang's ``ServerArgs`` record as bookkeeping (attribute
``_sere_config``), which its ``__reduce__`` carries into every worker process: ranks cannot
disagree, and no environment variable can leak into another server.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sere_sglang.errors import SereError
from sere_sglang.schedule.names import policy_names
from sere_sglang.schedule.request_quality import QUALITIES, QualityRules, parse_allowed
from sere_sglang.schedule.settings import Settings

BACKENDS = ("default", "sere")
ON_ERROR = ("exit", "fallback")
DEFAULT_QUALITY_BUDGET = 0.02
DEFAULT_MIN_GAIN = 0.03

_RECORD_ATTRIBUTE = "_sere_config"


def _option(default: Any, help: str, **flag: Any) -> Any:
    return field(default=default, metadata={"help": help, "flag": flag})


@dataclass(frozen=True)
class SereConfig:
    """What the operator asked for; None means "not given", resolved by `resolve_defaults`."""

    moe_backend: str = _option(
        "default",
        "MoE backend. 'sere' re-routes each token's low-ranked experts to similar experts that "
        "the batch already needs, so that decoding loads fewer experts; --moe-runner-backend "
        "keeps choosing the grouped GEMM under it.",
        choices=BACKENDS,
    )
    sere_profile: str | None = _option(
        None,
        "Similarity profile of this model, written by 'sere-sglang calibrate'; auto: calibrate "
        "first where there is none, once, then serve (default: sere_profile.safetensors in the "
        "model folder or hub repository, else what calibrate wrote into this user's cache).",
        metavar="PATH",
    )
    sere_policy: str | None = _option(
        None,
        "How the degree of skipping is chosen for each forward. adaptive: the largest predicted "
        "gain whose expected loss fits --sere-quality-budget. slo: just enough of it to hold "
        "--sere-tpot-slo-ms. static: --sere-primary-k and --sere-threshold on every decode batch "
        "(default: adaptive; static or slo when only their flags are given).",
        choices=policy_names(),
    )
    sere_primary_k: int | None = _option(
        None,
        "static: S, each token's S highest-weighted experts are primary and never re-routed; "
        "1 <= S < top-k, smaller skips more (default: half of the model's top-k).",
        type=int,
        metavar="S",
    )
    sere_threshold: float | None = _option(
        None,
        "static: rho, keep an expert when no primary expert of the batch is at least this "
        "similar to it; 0 re-routes every secondary expert, 1 none but exact twins (default: 0).",
        type=float,
        metavar="RHO",
    )
    sere_quality_budget: float | None = _option(
        None,
        "adaptive and slo: expected loss that a batch may cost at most, as a share of the MoE "
        "layers' output energy; 0 is exact, 1 the worst that re-routing can do "
        f"(default: {DEFAULT_QUALITY_BUDGET:g}).",
        type=float,
        metavar="LOSS",
    )
    sere_min_gain: float | None = _option(
        None,
        "adaptive and slo: leave a batch alone when the predicted gain in step time is smaller "
        f"than this (default: {DEFAULT_MIN_GAIN:g}).",
        type=float,
        metavar="GAIN",
    )
    sere_tpot_slo_ms: float | None = _option(
        None,
        "slo: target for the time per output token, in milliseconds.",
        type=float,
        metavar="MS",
    )
    sere_quality: str | None = _option(
        None,
        'What a request gets that does not ask with custom_params {"sere": ...}. exact: its '
        "experts are never re-routed. balanced: the policy's choice. fast: --sere-fast-primary-k "
        "(default: balanced).",
        choices=QUALITIES,
    )
    sere_allow_quality: str | None = _option(
        None,
        "What requests may ask for, comma-separated; others are refused (default: all of "
        f"{','.join(QUALITIES)}).",
        metavar="LIST",
    )
    sere_fast_primary_k: int | None = _option(
        None,
        "S of fast requests (default: 1).",
        type=int,
        metavar="S",
    )
    sere_fast_threshold: float | None = _option(
        None,
        "rho of fast requests (default: 0).",
        type=float,
        metavar="RHO",
    )
    sere_min_batch: int | None = _option(
        None,
        "Smallest decode batch, in tokens, that is re-routed (default: 3; 1 with static).",
        type=int,
        metavar="N",
    )
    sere_max_batch: int | None = _option(
        None,
        "Largest decode batch, in tokens, that is re-routed (default: no limit).",
        type=int,
        metavar="N",
    )
    sere_scale: bool | None = _option(
        None,
        "Also scale the weight of a slot that moves to another expert by the multiple of that "
        "expert's output that comes closest to its own; needs a profile that was calibrated with "
        "--measure residual among its measures (default: weights stay as the router gave them).",
        action="store_true",
    )
    sere_cost: str | None = _option(
        None,
        "What this model's MoE layers cost, written by 'sere-sglang doctor --model MODEL --out "
        'FILE\', instead of timing them at start. With a "step" in the file, adaptive decides by '
        "composition and settings alone, whatever steps take "
        "(default: time the layers at start, within 2 s on a CPU, 0.5 s on a GPU).",
        metavar="FILE",
    )
    sere_trace: str | None = _option(
        None,
        "Write one JSON line per forward to this file: composition, operating point, step time. "
        "'sere-sglang simulate --trace' replays it; further ranks write FILE.rank1 and so on "
        "(default: no trace).",
        metavar="FILE",
    )
    sere_on_error: str | None = _option(
        None,
        "When SERE cannot be had (no profile, wrong model, unsupported format): stop at start, "
        "or serve without it after a warning (default: exit).",
        choices=ON_ERROR,
    )

    @property
    def enabled(self) -> bool:
        return self.moe_backend == "sere"

    def check(self) -> SereConfig:
        """Validate what needs no model. Returns self; raises `SereError` naming the flag."""
        if not self.enabled:
            given = [flag_of(f.name) for f in _sere_fields() if getattr(self, f.name) is not None]
            if given:
                raise SereError(
                    f"{', '.join(given)} given without --moe-backend sere: "
                    "add --moe-backend sere, or drop the flag"
                )
            return self
        _check_choice("moe_backend", self.moe_backend, BACKENDS)
        _check_choice("sere_policy", self.sere_policy, policy_names())
        _check_choice("sere_on_error", self.sere_on_error, ON_ERROR)
        _check_choice("sere_quality", self.sere_quality, QUALITIES)
        for name in ("sere_primary_k", "sere_fast_primary_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SereError(
                    f"{flag_of(name)} {value}: must be at least 1 "
                    "and smaller than the model's top-k"
                )
        for name in ("sere_threshold", "sere_fast_threshold"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise SereError(
                    f"{flag_of(name)} {value:g}: similarities lie in [0, 1], so must the threshold"
                )
        for name in ("sere_quality_budget", "sere_min_gain"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise SereError(f"{flag_of(name)} {value:g}: must lie in [0, 1]")
        if self.sere_tpot_slo_ms is not None and not self.sere_tpot_slo_ms > 0:
            raise SereError(f"--sere-tpot-slo-ms {self.sere_tpot_slo_ms:g}: must be positive")
        if self.sere_policy == "slo" and self.sere_tpot_slo_ms is None:
            raise SereError("--sere-policy slo needs its target: add --sere-tpot-slo-ms MS")
        if self.sere_tpot_slo_ms is not None and self.policy != "slo":
            raise SereError(
                f"--sere-tpot-slo-ms is the target of --sere-policy slo, not of {self.policy}: "
                "change the policy or drop the flag"
            )
        allowed = self.quality_rules()
        if allowed.default not in allowed.allowed:
            raise SereError(
                f"--sere-quality {allowed.default} is not in --sere-allow-quality "
                f"{','.join(allowed.allowed)}"
            )
        low = 1 if self.sere_min_batch is None else self.sere_min_batch
        if low < 1:
            raise SereError(f"--sere-min-batch {low}: must be at least 1")
        if self.sere_max_batch is not None and self.sere_max_batch < low:
            raise SereError(
                f"--sere-max-batch {self.sere_max_batch} is below --sere-min-batch {low}: "
                "no batch would ever be re-routed"
            )
        return self

    @property
    def policy(self) -> str:
        """The policy asked for, by name or by the flags that only it has."""
        if self.sere_policy is not None:
            return self.sere_policy
        if self.sere_primary_k is not None or self.sere_threshold is not None:
            return "static"
        return "slo" if self.sere_tpot_slo_ms is not None else "adaptive"

    def quality_rules(self) -> QualityRules:
        """Raises `SereError` for a list that names no quality."""
        allowed: tuple[str, ...] = QUALITIES
        if self.sere_allow_quality is not None:
            allowed = parse_allowed(self.sere_allow_quality)
        return QualityRules(self.sere_quality or "balanced", allowed)

    def live_settings(self) -> Settings:
        """What a server starts with, once `resolve_defaults` has run."""
        fields = {f.name for f in dataclasses.fields(Settings)}
        given = {name: getattr(self, f"sere_{name}") for name in fields - {"enabled"}}
        return Settings(enabled=True, **given)

    def resolve_defaults(self, *, top_k: int) -> SereConfig:
        """Fill every unset option for a model with `top_k` routed experts per token."""
        for name in ("sere_primary_k", "sere_fast_primary_k"):
            value = getattr(self, name)
            if value is not None and value >= top_k:
                raise SereError(
                    f"{flag_of(name)} {value}: must be smaller than the model's "
                    f"top-k ({top_k} routed experts per token), or nothing is ever re-routed"
                )
        defaults: dict[str, Any] = {
            "sere_policy": self.policy,
            "sere_primary_k": max(1, top_k // 2),
            "sere_threshold": 0.0,
            "sere_quality_budget": DEFAULT_QUALITY_BUDGET,
            "sere_min_gain": DEFAULT_MIN_GAIN,
            "sere_quality": "balanced",
            "sere_allow_quality": ",".join(QUALITIES),
            "sere_fast_primary_k": 1,
            "sere_fast_threshold": 0.0,
            # A batch of one or two has hardly any experts to stand in for others.
            "sere_min_batch": 1 if self.policy == "static" else 3,
            "sere_on_error": "exit",
        }
        unset = {name: v for name, v in defaults.items() if getattr(self, name) is None}
        if top_k < 2:
            raise SereError("--moe-backend sere: top-1 routing has no secondary experts to skip")
        return dataclasses.replace(self, **unset)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add one flag per `SereConfig` field."""
    group = parser.add_argument_group("SERE expert re-routing (sere-sglang)")
    for f in dataclasses.fields(SereConfig):
        group.add_argument(
            flag_of(f.name),
            dest=f.name,
            default=f.default,
            help=f.metadata["help"].replace("%", "%%"),
            **f.metadata["flag"],
        )


def from_namespace(args: argparse.Namespace) -> SereConfig:
    names = [f.name for f in dataclasses.fields(SereConfig)]
    return SereConfig(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def pop_keywords(keywords: dict[str, Any]) -> SereConfig:
    """Take SERE's keywords out of a ``sglang.Engine(**keywords)`` call."""
    names = [f.name for f in dataclasses.fields(SereConfig) if f.name in keywords]
    return SereConfig(**{name: keywords.pop(name) for name in names})


def attach(record: Any, config: SereConfig) -> None:
    setattr(record, _RECORD_ATTRIBUTE, config)


def config_of(record: Any) -> SereConfig:
    """The config riding on a ``ServerArgs`` record; the default one when there is none."""
    return getattr(record, _RECORD_ATTRIBUTE, None) or SereConfig()


def _sere_fields() -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(SereConfig) if f.name.startswith("sere_")]


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise SereError(f"{flag_of(name)} {value}: choose from {', '.join(choices)}")
