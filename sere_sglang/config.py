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

from sere_sglang.schedule.names import policy_names
from sere_sglang.schedule.point import RULES, SIMILARITY
from sere_sglang.schedule.request_quality import QUALITIES, QualityRules, parse_allowed
from sere_sglang.schedule.settings import Settings

BACKENDS = ("default", "sere")
ON_ERROR = ("exit", "fallback")
DEFAULT_QUALITY_BUDGET = 0.02
DEFAULT_MIN_GAIN = 0.03
AUTO_RULE, BEST_RULE = "auto", "energy"
"""``--sere-rule auto`` and what it stands for in this version."""

_RECORD_ATTRIBUTE = "_sere_config"


def _option(default: Any, help: str, **flag: Any) -> Any:
    return field(default=default, metadata={"help": help, "flag": flag})


@dataclass(frozen=True)
class SereConfig:
    """What the operator asked for; None means "not given", resolved by `config_check.resolved`."""

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
    sere_rule: str | None = _option(
        None,
        "Which experts a batch loads, and what its tokens get instead of the others. similarity: "
        "SERE, the most similar one. piggyback: the token's own next-best that is loaded. topk: "
        "each token's best few only. budget: --sere-max-experts, by summed router score. energy: "
        "all but those whose routing weight fits in --sere-quality-budget, what a token loses "
        "made up for by the profile's surrogates. auto: energy. Rules beside similarity need the "
        "CPU engine so far (default: similarity).",
        choices=(*RULES, AUTO_RULE),
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
        "static: S, each token's S highest-weighted experts are primary and never re-routed (k0 "
        "of rules piggyback and topk); 1 <= S < top-k, smaller skips more (default: half of the "
        "model's top-k).",
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
        "layers' output energy; 0 is exact, 1 the worst that re-routing can do. Under rule energy "
        "also of static, and what the kernel may drop "
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
    sere_max_experts: int | None = _option(
        None,
        "static under rule budget: experts that a batch loads in each layer, more only if its "
        "tokens' best ones are more.",
        type=int,
        metavar="B",
    )
    sere_surrogates: str | None = _option(
        None,
        "Under rule energy, give what a token loses a low-rank stand-in of its own expert, where "
        "the profile was calibrated with --surrogate-rank (default: on).",
        choices=("on", "off"),
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

    @property
    def rule(self) -> str:
        """The rule asked for; ``auto`` is the best that this version has."""
        return BEST_RULE if self.sere_rule == AUTO_RULE else self.sere_rule or SIMILARITY

    @property
    def uses_surrogates(self) -> bool:
        """Whether the server would use a profile's surrogates."""
        return self.rule == "energy" and self.sere_surrogates != "off"

    @property
    def policy(self) -> str:
        """The policy asked for, by name or by the flags that only it has."""
        if self.sere_policy is not None:
            return self.sere_policy
        if any(
            getattr(self, f"sere_{name}") is not None
            for name in ("primary_k", "threshold", "max_experts")
        ):
            return "static"
        return "slo" if self.sere_tpot_slo_ms is not None else "adaptive"

    def quality_rules(self) -> QualityRules:
        """Raises `SereError` for a list that names no quality."""
        allowed: tuple[str, ...] = QUALITIES
        if self.sere_allow_quality is not None:
            allowed = parse_allowed(self.sere_allow_quality)
        return QualityRules(self.sere_quality or "balanced", allowed)

    def live_settings(self) -> Settings:
        """What a server starts with, once `config_check.resolved` has run."""
        fields = {f.name for f in dataclasses.fields(Settings)}
        own: dict[str, Any] = {
            "enabled": True, "rule": self.rule, "surrogates": self.sere_surrogates != "off"
        }  # fmt: skip
        given = {name: getattr(self, f"sere_{name}") for name in fields - own.keys()}
        return Settings(**own, **given)

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
