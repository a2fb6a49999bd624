"""Seam: SGLang's command line and ``ServerArgs`` record.

``ServerArgs.add_cli_args`` and ``from_cli_args`` have no extension point for a plugin's own
flags. The record is a sealed msgspec Struct, so ours travel beside its fields (see config.py).
``resolve_once`` is the last moment before worker processes start: the profile is checked there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.server_args import add_moe_runner_backend_choices

from sere_sglang import config
from sere_sglang.config_check import checked, for_device
from sere_sglang.errors import SereError, exit_on_error
from sere_sglang.names import FALLBACK
from sere_sglang.options import SereConfig
from sere_sglang.patches.seam import declare, require_applied

if TYPE_CHECKING:
    from sere_sglang.profile import MoeModelInfo

_TARGET = "sglang.srt.server_args.ServerArgs"


def register() -> None:
    """Teach SGLang the flags; their parser comes last, so that any failure leaves them unknown."""
    from sere_sglang.patches import engine

    declare(f"{_TARGET}.resolve_once", _resolve_once, HookType.AROUND)
    declare(f"{_TARGET}.resolved_dict", _resolved_dict, HookType.AFTER)
    declare(f"{_TARGET}.from_cli_args", _from_cli_args, HookType.AROUND, needs=["args"])
    if "sglang.srt.entrypoints.engine" in sys.modules:
        engine.accept_keywords()
    add_moe_runner_backend_choices(["sere"])
    declare(f"{_TARGET}.add_cli_args", _add_cli_args, HookType.AFTER, needs=["parser"])


def _add_cli_args(_result: None, parser: argparse.ArgumentParser) -> None:
    require_applied(f"{_TARGET}.{name}" for name in ("resolve_once", "from_cli_args"))
    config.add_cli_args(parser)


def _from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    with exit_on_error():
        _require_config_was_read(getattr(args, "config", None) or "")
    asked = config.from_namespace(args)
    if getattr(args, "moe_runner_backend", None) == "sere":
        # SGLang's own registration point; the grouped GEMM under it stays automatic.
        asked = dataclasses.replace(asked, moe_backend="sere")
        args.moe_runner_backend = "auto"
    with exit_on_error():
        checked(asked)
    record = original(cls, args)
    config.attach(record, asked)
    record._sere_from_cli = True
    return record


def _require_config_was_read(path: str) -> None:
    """SGLang merges ``--config FILE`` away; ``--config=FILE`` it ignores without a word."""
    try:
        asks = bool(path) and Path(path).is_file() and b"sere" in Path(path).read_bytes()
    except (OSError, ValueError):  # no file that anybody reads
        asks = False
    if asks:
        raise SereError(
            f"--config={path} asks for SERE, but SGLang reads the file only when it is written "
            f"with a space: --config {path}"
        )


def _resolve_once(original: Callable[..., None], record: Any) -> None:
    fresh = not getattr(record, "_resolution_finished", False)
    original(record)
    asked = config.config_of(record)
    if not (fresh and asked.enabled):
        return
    from sglang.srt.arg_groups.overrides import model_config_of, resolved_view

    from sere_sglang.cpu import isa as cpu_isa
    from sere_sglang.cpu.large_pages import ask_allocator_for_large_pages
    from sere_sglang.patches import engine, moe_rows, moe_runner, server_flags, shadow
    from sere_sglang.preflight import prepare

    asked = for_device(asked, record.device)

    def restrict(asked: SereConfig) -> SereConfig:
        server_flags.require_supported(record, hf_config.get("architectures") or ())
        moe_runner.require_known_runner(record, allow_untested=bool(asked.sere_allow_untested))
        if asked.sere_shadow:
            shadow.require_supported(resolved_view(record))
        return moe_rows.restrict(record, asked)

    with engine.reported(record):
        if record.device == "cpu":
            cpu_isa.isa()  # refuses a SERE_CPU_ISA that does not run here, before workers start
            ask_allocator_for_large_pages()
        hf_config = model_config_of(record).hf_config.to_dict()
        try:
            resolved = prepare(
                record.model_path,
                hf_config,
                asked,
                record.revision,
                restrict=restrict,
                calibrate=lambda model: _calibrated(record, asked, model),
            )
        except SereError as error:
            if not asked.falls_back:
                raise
            config.serve_without(record, str(error))
            return
        config.attach(record, resolved)
    engine.require_confirmation()


def _calibrated(record: Any, asked: SereConfig, model: MoeModelInfo) -> Path:
    """The model loads as it will be served: on as many ranks, quantized alike."""
    from sere_sglang.on_demand import calibrated

    given = {
        "--revision": record.revision,
        "--tokenizer-path": record.tokenizer_path,
        "--dtype": record.dtype,
        "--load-format": record.load_format,
        "--quantization": record.quantization,
        "--tp-size": record.tp_size if record.tp_size > 1 else None,
    }
    server_args = [f"{flag}={value}" for flag, value in given.items() if value is not None]
    if record.trust_remote_code:
        server_args.append("--trust-remote-code")
    device = record.device if record.device in ("cpu", "cuda") else "auto"
    flags = [f"--device={device}"]
    if asked.uses_surrogates:
        flags.append("--surrogate-rank=auto")
    return calibrated(model, flags, server_args)


def _resolved_dict(result: dict[str, Any], record: Any) -> dict[str, Any]:
    asked = config.config_of(record)
    if asked.enabled:
        result.update(asked.as_dict())
    reason = config.reason_without(record)
    if reason is not None:
        result[FALLBACK] = reason
    return result
