"""Every option, once: name, type, range, default, help, and whether it changes while serving.

Command-line flags and ``sglang.Engine`` keywords (config.py), what a wrong one is told
(config_check.py), live settings and ``/set_internal_state`` (schedule/settings.py and
patches/number_keys.py), ``sere-sglang simulate`` and the README's table all read this.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from msgspec import Meta

from sere_sglang.names import AUTO, QUALITIES, RULES, SIMILARITY, policy_names
from sere_sglang.option import MOST_ROWS, Option, option

_SHARE = Meta(ge=0.0, le=1.0)
_COUNT = Meta(ge=1, le=MOST_ROWS)
_MILLISECONDS = Meta(ge=0.01, le=1e6)
_KL = Meta(ge=1e-6, le=100.0)


@dataclass(frozen=True)
class SereConfig:
    """What the operator asked for; None means "not given", resolved by `config_check.resolved`."""

    moe_backend: str = option(
        "MoE backend, where sere switches re-routing on. It sends each token's low-ranked experts "
        "to similar experts that the batch already needs, so that decoding loads fewer; "
        "--moe-runner-backend keeps choosing the grouped GEMM under it.",
        choices=("default", "sere"),
        unset="default",
        default="default",
    )
    sere_profile: str | None = option(
        "Similarity profile of this model, written by 'sere-sglang calibrate'; auto calibrates "
        "first where there is none, once, then serves.",
        metavar="{PATH,auto}",
        default_reads="sere_profile.safetensors in the model folder or hub repository, else what "
        "calibrate wrote into this user's cache",
    )
    sere_rule: str | None = option(
        "Which experts a batch loads, and what its tokens get instead of the others. similarity: "
        "SERE, the most similar one. piggyback: the token's own next-best that is loaded. topk: "
        "each token's best few only. budget: --sere-max-experts, by summed router score. energy: "
        "all but those whose routing weight fits in --sere-quality-budget, what a token loses "
        "made up for by the profile's surrogates. auto: the one that errs least on the profile's "
        "held-out text, of those that this model and machine can have. A GPU server that is "
        "started under similarity stays under it; kernels of the others for GPUs have not been "
        "measured.",
        choices=(*RULES, AUTO),
        default=lambda asked, _: asked.rule,
        default_reads="auto; similarity on a GPU, with --sere-policy static, or when only flags "
        "of similarity are given",
        live=True,
    )
    sere_policy: str | None = option(
        "How the degree of skipping is chosen for each forward. adaptive: the largest predicted "
        "gain whose expected loss fits --sere-quality-budget. slo: just enough of it to hold "
        "--sere-tpot-slo-ms. static: --sere-primary-k and --sere-threshold on every decode batch.",
        choices=policy_names,
        default=lambda asked, _: asked.policy,
        default_reads="adaptive; static or slo when only their flags are given",
        live=True,
    )
    sere_quality_budget: float | None = option(
        "adaptive, slo, and rule energy under static: expected loss that a batch may cost at most, "
        "as a share of the MoE layers' output energy. 0 is exact, 1 the worst that re-routing can "
        "do. Under rule energy it is what the kernel may drop.",
        _SHARE,
        default=0.02,
        metavar="LOSS",
        live=True,
    )
    sere_tuned: bool | None = option(
        "adaptive: take the quality budget of each batch size from the profile, where 'sere-sglang "
        "tune' has written them for the rule in force.",
        switch=True,
        default=lambda asked, _: asked.sere_quality_budget is None,
        default_reads="on; off with --sere-quality-budget",
        live=True,
        policies=("adaptive",),
    )
    sere_min_gain: float | None = option(
        "adaptive and slo: leave a batch alone when the predicted gain in step time is smaller.",
        _SHARE,
        default=0.03,
        metavar="GAIN",
        live=True,
        policies=("adaptive", "slo"),
    )
    sere_tpot_slo_ms: float | None = option(
        "slo: target for the time per output token, in milliseconds.",
        _MILLISECONDS,
        metavar="MS",
        live=True,
        nullable=True,
    )
    sere_primary_k: int | None = option(
        "static: S, each token's S highest-weighted experts are primary and never re-routed (k0 "
        "of rules piggyback and topk). Smaller skips more.",
        _COUNT,
        default=lambda _, top_k: max(1, top_k // 2),
        default_reads="half of the model's top-k",
        metavar="S",
        live=True,
        below_top_k=True,
        rules=(SIMILARITY, "piggyback", "topk"),
        policies=("static",),
    )
    sere_threshold: float | None = option(
        "static: rho, keep an expert when no primary expert of the batch is at least this similar "
        "to it. 0 re-routes every secondary expert, 1 none but exact twins.",
        _SHARE,
        default=0.0,
        metavar="RHO",
        live=True,
        rules=(SIMILARITY,),
        policies=("static",),
    )
    sere_max_experts: int | None = option(
        "static under rule budget: experts that a batch loads in each layer, more only if its "
        "tokens' best ones are more.",
        _COUNT,
        metavar="B",
        live=True,
        nullable=True,
        rules=("budget",),
    )
    sere_min_batch: int | None = option(
        "Smallest decode batch, in tokens, that is re-routed.",
        _COUNT,
        # A batch of one or two has hardly any experts to stand in for others.
        default=lambda asked, _: min(
            1 if asked.policy == "static" else 3, asked.sere_max_batch or MOST_ROWS
        ),
        default_reads="3; 1 with static",
        metavar="N",
        live=True,
    )
    sere_max_batch: int | None = option(
        "Largest decode batch, in tokens, that is re-routed.",
        _COUNT,
        default_reads="no limit",
        metavar="N",
        live=True,
        nullable=True,
    )
    sere_quality: str | None = option(
        'What a request gets that does not ask. It asks with custom_params {"sere": "exact"}. '
        "exact: its experts are never re-routed. balanced: the policy's choice. fast: "
        "--sere-fast-primary-k.",
        choices=QUALITIES,
        default="balanced",
    )
    sere_allow_quality: str | None = option(
        "What requests may ask for, comma-separated; others are refused.",
        default=",".join(QUALITIES),
        metavar="LIST",
    )
    sere_fast_primary_k: int | None = option(
        "S of fast requests.",
        _COUNT,
        default=1,
        metavar="S",
        live=True,
        below_top_k=True,
    )
    sere_fast_threshold: float | None = option(
        "rho of fast requests.",
        _SHARE,
        default=0.0,
        metavar="RHO",
        live=True,
        rules=(SIMILARITY,),
    )
    sere_scale: bool | None = option(
        "Also scale the weight of a slot that moves to another expert by the multiple of that "
        "expert's output that comes closest to its own; the profile needs 'calibrate --measure "
        "frobenius --measure residual'.",
        default_reads="weights stay as the router gave them",
        rules=(SIMILARITY,),
    )
    sere_surrogates: bool | None = option(
        "energy: give what a token loses a low-rank stand-in of its own expert, where the profile "
        "was calibrated with --surrogate-rank.",
        switch=True,
        default=True,
        default_reads="on",
        live=True,
        rules=("energy", AUTO),
    )
    sere_cost: str | None = option(
        "What this model's MoE layers cost, written by 'sere-sglang doctor --model MODEL --out "
        "FILE', instead of timing them at start: the same decisions on every machine. With a "
        '"step" in the file, adaptive decides by composition and settings alone, whatever steps '
        "take.",
        metavar="FILE",
        default_reads="time the layers at start, within 2 s on a CPU, 0.5 s on a GPU",
    )
    sere_trace: str | None = option(
        "Write one JSON line per forward to this file: composition, operating point, step time. "
        "'sere-sglang simulate --trace' replays it; further ranks write FILE.rank1 and so on.",
        metavar="FILE",
        default_reads="no trace",
    )
    sere_allow_untested: bool | None = option(
        "Serve on a MoE runner or all-to-all backend whose source could not be read, so that what "
        "it makes of re-routed rows is not known.",
        default=False,
        default_reads="refused by name at start",
    )
    sere_shadow: float | None = option(
        "Share of the requests that may be re-routed which are scored again by exact routing once "
        "they have finished, when the server is idle or 10 s have passed: what users lost is "
        "sglang:sere_shadow_kl, in nats per token. Each costs its log-probabilities and a prefill.",
        _SHARE,
        default=0.0,
        metavar="RATE",
        default_reads="none",
        live=True,
    )
    sere_max_kl: float | None = option(
        "Brake: once sglang:sere_shadow_kl is surely above this, the server goes exact, until an "
        "operator sends enabled true. Needs --sere-shadow.",
        _KL,
        metavar="KL",
        default_reads="no brake",
        live=True,
        nullable=True,
    )
    sere_on_error: str | None = option(
        "When SERE cannot be had (no profile, wrong model, unsupported format): stop at start, or "
        "serve without it after a warning.",
        choices=("exit", "fallback"),
        default="exit",
    )

    @property
    def enabled(self) -> bool:
        return self.moe_backend == "sere"

    @property
    def falls_back(self) -> bool:
        """Whether the server is to do without SERE where that cannot be had."""
        return self.sere_on_error == "fallback"

    @property
    def given(self) -> list[Option]:
        """The options that the operator gave."""
        return [option for option in OPTIONS.values() if getattr(self, option.name) is not None]

    @property
    def rule(self) -> str:
        """The rule asked for, by name or by the flags that only it has. What ``auto`` is every rank
        finds out (schedule/auto_rule.py)."""
        if self.sere_rule is not None:
            return self.sere_rule
        own = any(SIMILARITY in option.rules for option in self.given)
        return SIMILARITY if own or self.policy == "static" else AUTO

    @property
    def uses_surrogates(self) -> bool:
        """Whether the server would use a profile's surrogates."""
        return self.rule in ("energy", AUTO) and self.sere_surrogates is not False

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

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _options() -> dict[str, Option]:
    hints = typing.get_type_hints(SereConfig)
    found = {}
    for f in dataclasses.fields(SereConfig):
        base, *_none = typing.get_args(hints[f.name]) or [hints[f.name]]
        found[f.name] = Option(name=f.name, base=base, **f.metadata)
    return found


OPTIONS = _options()
"""Field of `SereConfig` -> option, in the order that people read them in."""

LIVE = {each.setting: each for each in OPTIONS.values() if each.live}
"""Live setting -> option."""
