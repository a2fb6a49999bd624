"""Options on their way: command line or ``sglang.Engine`` keywords -> ``ServerArgs`` -> ranks.

The parsed config rides on SGLang's ``ServerArgs`` record as bookkeeping (attribute
``_sere_config``), which its ``__reduce__`` carries into every worker process: ranks cannot
disagree, and no environment variable can leak into another server.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

from sere_sglang.names import QUALITIES
from sere_sglang.option import Option
from sere_sglang.options import OPTIONS, SereConfig
from sere_sglang.schedule.request_quality import QualityRules, parse_allowed
from sere_sglang.schedule.settings import Settings

logger = logging.getLogger(__name__)

_RECORD_ATTRIBUTE = "_sere_config"
_FALLBACK_ATTRIBUTE = "_sere_fallback"
_SWITCH = {"on": True, "off": False}


def quality_rules(config: SereConfig) -> QualityRules:
    """Raises `SereError` for a list that names no quality."""
    allowed: tuple[str, ...] = QUALITIES
    if config.sere_allow_quality is not None:
        allowed = parse_allowed(config.sere_allow_quality)
    return QualityRules(config.sere_quality or "balanced", allowed)


def live_settings(config: SereConfig) -> Settings:
    """What a server starts with, once `config_check.resolved` has run."""
    live = [option for option in OPTIONS.values() if option.live]
    return Settings(enabled=True, **{o.setting: getattr(config, o.name) for o in live})


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add one flag per option."""
    group = parser.add_argument_group("SERE expert re-routing (sere-sglang)")
    for option in OPTIONS.values():
        group.add_argument(
            option.flag,
            dest=option.name,
            default=SereConfig.__dataclass_fields__[option.name].default,
            help=help_of(option).replace("%", "%%"),
            **_syntax(option),
        )


def help_of(option: Option) -> str:
    """Its help with its default, as ``--help`` shows it."""
    default = default_reads(option)
    return f"{option.help[:-1]} (default: {default})." if default else option.help


def default_reads(option: Option) -> str:
    """Its default in words; empty where unset means nothing in particular."""
    if option.default_reads is not None:
        return option.default_reads
    if option.default is None:
        return ""
    return f"{option.default:g}" if option.base in (int, float) else str(option.default)


def _syntax(option: Option) -> dict[str, Any]:
    """How argparse reads it."""
    if option.switch:
        return {"type": _switch, "metavar": f"{{{','.join(_SWITCH)}}}"}
    if option.base is bool:
        return {"action": "store_true"}
    if option.names:
        return {"choices": option.names}
    return {"type": option.base, "metavar": option.metavar}


def _switch(text: str) -> bool:
    if text.lower() not in _SWITCH:
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(_SWITCH)}")
    return _SWITCH[text.lower()]


def from_namespace(args: argparse.Namespace) -> SereConfig:
    return SereConfig(**{name: getattr(args, name) for name in OPTIONS if hasattr(args, name)})


def pop_keywords(keywords: dict[str, Any]) -> SereConfig:
    """Take SERE's keywords out of a ``sglang.Engine(**keywords)`` call. Switches may be spelt as on
    the command line."""
    taken = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
    for name, value in taken.items():
        if OPTIONS[name].switch and isinstance(value, str):
            taken[name] = _SWITCH.get(value.lower(), value)
    return SereConfig(**taken)


def attach(record: Any, config: SereConfig) -> None:
    setattr(record, _RECORD_ATTRIBUTE, config)


def serve_without(record: Any, reason: str) -> None:
    """SERE was asked for with ``--sere-on-error fallback``, and cannot be had for this `reason`."""
    attach(record, SereConfig())
    setattr(record, _FALLBACK_ATTRIBUTE, reason)
    # No warning: those an offline Engine leaves out by default.
    logger.error("Serving WITHOUT SERE (--sere-on-error fallback): %s", reason)


def reason_without(record: Any) -> str | None:
    """Why a server that was asked for SERE runs without; None for all others."""
    return getattr(record, _FALLBACK_ATTRIBUTE, None)


def config_of(record: Any) -> SereConfig:
    """The config riding on a ``ServerArgs`` record; the default one when there is none."""
    return getattr(record, _RECORD_ATTRIBUTE, None) or SereConfig()
