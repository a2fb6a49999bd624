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

BACKENDS = ("default", "sere")
POLICIES = ("static",)
ON_ERROR = ("exit", "fallback")

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
        "Similarity profile of this model, written by 'sere-sglang calibrate' "
        "(default: sere_profile.safetensors in the model folder).",
        metavar="PATH",
    )
    sere_policy: str | None = _option(
        None,
        "How the degree of skipping is chosen for each forward. static: --sere-primary-k and "
        "--sere-threshold on every decode batch between --sere-min-batch and --sere-max-batch "
        "(default: static).",
        choices=POLICIES,
    )
    sere_primary_k: int | None = _option(
        None,
        "S: each token's S highest-weighted experts are primary and never re-routed; "
        "1 <= S < top-k, smaller skips more (default: half of the model's top-k).",
        type=int,
        metavar="S",
    )
    sere_threshold: float | None = _option(
        None,
        "rho: keep an expert when no primary expert of the batch is at least this similar to it; "
        "0 re-routes every secondary expert, 1 none but exact twins (default: 0).",
        type=float,
        metavar="RHO",
    )
    sere_min_batch: int | None = _option(
        None,
        "Smallest decode batch, in tokens, that is re-routed (default: 1).",
        type=int,
        metavar="N",
    )
    sere_max_batch: int | None = _option(
        None,
        "Largest decode batch, in tokens, that is re-routed (default: no limit).",
        type=int,
        metavar="N",
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
        _check_choice("sere_policy", self.sere_policy, POLICIES)
        _check_choice("sere_on_error", self.sere_on_error, ON_ERROR)
        if self.sere_primary_k is not None and self.sere_primary_k < 1:
            raise SereError(
                f"--sere-primary-k {self.sere_primary_k}: must be at least 1 "
                "and smaller than the model's top-k"
            )
        if self.sere_threshold is not None and not 0.0 <= self.sere_threshold <= 1.0:
            raise SereError(
                f"--sere-threshold {self.sere_threshold:g}: similarities lie in [0, 1], "
                "so must the threshold"
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

    def resolve_defaults(self, *, top_k: int) -> SereConfig:
        """Fill every unset option for a model with `top_k` routed experts per token."""
        primary_k = self.sere_primary_k
        if primary_k is None:
            primary_k = max(1, top_k // 2)
        if primary_k >= top_k:
            raise SereError(
                f"--sere-primary-k {primary_k}: must be smaller than the model's "
                f"top-k ({top_k} routed experts per token), or nothing is ever re-routed"
            )
        return dataclasses.replace(
            self,
            sere_policy=self.sere_policy or "static",
            sere_primary_k=primary_k,
            sere_threshold=0.0 if self.sere_threshold is None else self.sere_threshold,
            sere_min_batch=1 if self.sere_min_batch is None else self.sere_min_batch,
            sere_on_error=self.sere_on_error or "exit",
        )

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
