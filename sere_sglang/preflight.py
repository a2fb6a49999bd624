"""Checks in the launcher, before any worker process starts or any weight loads."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sere_sglang.config_check import idle_flags, resolved
from sere_sglang.errors import SereError
from sere_sglang.options import SereConfig
from sere_sglang.profile import (
    AUTO,
    MoeModelInfo,
    ProfileError,
    SereProfile,
    check_has_scale,
    check_profile_fits,
    find_profile,
    load_profile,
    surrogates_command,
)
from sere_sglang.schedule.cost_file import CostModel, check_cost_fits, load_cost

logger = logging.getLogger(__name__)


def prepare(
    model_path: str,
    hf_config: dict[str, Any],
    asked: SereConfig,
    revision: str | None = None,
    restrict: Callable[[SereConfig], SereConfig] = lambda asked: asked,
    calibrate: Callable[[MoeModelInfo], Path] | None = None,
) -> SereConfig:
    """The fully resolved config for this model.

    `restrict` takes away what the server's other flags rule out; `calibrate` writes the profile
    that ``--sere-profile auto`` does not find. Raises `SereError` when SERE cannot be given as
    asked.
    """
    model = MoeModelInfo.from_config(hf_config, name=model_path, revision=revision)
    config = resolved(restrict(asked), top_k=model.top_k)
    _check_max_experts(config, model)
    path = _profile(model, asked.sere_profile, calibrate)
    profile = load_profile(path)
    check_profile_fits(profile, model, path)
    if asked.sere_scale:
        check_has_scale(profile, model, path)
    if asked.sere_cost is not None:
        cost = load_cost(asked.sere_cost)
        check_cost_fits(cost, CostModel.of(model), asked.sere_cost)
    _check_surrogates(profile, model, path, asked)
    _tell_idle_flags(asked)
    return dataclasses.replace(config, sere_profile=str(path))


def _tell_idle_flags(asked: SereConfig) -> None:
    idle = idle_flags(asked)
    if idle:
        logger.warning(
            "%s: --sere-policy %s does not look at that; it holds once the policy is changed "
            "(the rule is %s)",
            ", ".join(idle),
            asked.policy,
            asked.rule,
        )


def _check_max_experts(config: SereConfig, model: MoeModelInfo) -> None:
    if (config.sere_max_experts or 0) > model.num_experts:
        raise SereError(
            f"--sere-max-experts {config.sere_max_experts}: a layer has {model.num_experts} "
            "experts; choose fewer"
        )


def _check_surrogates(
    profile: SereProfile, model: MoeModelInfo, path: Path, asked: SereConfig
) -> None:
    """Rule energy does without, but nobody should miss them unknowingly."""
    command = surrogates_command(profile, model)
    if not asked.uses_surrogates or command is None:
        return
    if asked.sere_surrogates:
        raise ProfileError(
            f"--sere-surrogates on: {path} has none; write them with '{command}', or drop the flag"
        )
    logger.warning(
        "--sere-rule %s: %s has no surrogates, so what tokens lose is made up for in part only; "
        "'%s' writes them",
        asked.rule,
        path,
        command,
    )


def _profile(
    model: MoeModelInfo, given: str | None, calibrate: Callable[[MoeModelInfo], Path] | None
) -> Path:
    if given != AUTO or calibrate is None:
        return find_profile(model, given)
    try:
        return find_profile(model)
    except ProfileError:
        return calibrate(model)
