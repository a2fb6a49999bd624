"""Seam: the resolution step ``handle_moe_kernel_config``, by SGLang's own registration for it.

The last moment at which a runner can be chosen before what depends on it is; no weight has loaded.
Where the user left the runner to SGLang and it would take one that routes inside its kernel, the
best one that takes standard top-k is declared in its place. What a user chose is refused, with that
one as advice. A calibration gets one that gives every row to every expert.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from sere_sglang import config
from sere_sglang.errors import SereError
from sere_sglang.patches.calibration import collector_of
from sere_sglang.patches.seam import resolve
from sere_sglang.runtime.runner_choice import (
    calibration_runner,
    instead,
    layer_runner,
    standard_runner,
)
from sere_sglang.runtime.runners import RUNNERS, require_known

logger = logging.getLogger(__name__)

_OVERRIDES = "sglang.srt.arg_groups.overrides"
_STEP = "handle_moe_kernel_config"


def register() -> None:
    resolve("sglang.srt.arg_groups.resolution_hooks.register_resolution_hook")(_STEP)(_choose)


def _choose(record: Any, previous: Callable[[Any], None]) -> None:
    calibrates = collector_of(record) is not None
    if (calibrates or config.config_of(record).enabled) and _on_gpu(record):
        _take_another(record, calibrates=calibrates)
    previous(record)


def _take_another(record: Any, *, calibrates: bool) -> None:
    view = resolve(f"{_OVERRIDES}.resolved_view")(record)
    if _asked(record) != "auto" or view.moe_a2a_backend != "none":
        return
    # What the step itself would first make of the quantization.
    declared = resolve(f"{_OVERRIDES}._moe_runner_backend_quant_constraints")(view)
    chosen = declared.get("moe_runner_backend", view.moe_runner_backend)
    quantization, sm, architecture = quantization_of(view), _sm(), _architecture(view)
    other = (
        calibration_runner(chosen, quantization, sm)
        if calibrates
        else instead(chosen, quantization, sm, architecture)
    )
    if other is None:
        return
    resolve(f"{_OVERRIDES}.declare_resolution")(record, "sere-sglang", moe_runner_backend=other)
    logger.info(
        "SERE: --moe-runner-backend %s, as %s, which SGLang chose, %s",
        other,
        layer_runner(chosen, quantization, sm),
        "cannot give every row to every expert" if calibrates else "routes inside its kernel",
    )


def require_known_runner(record: Any, *, allow_untested: bool) -> None:
    """Of a resolved ``ServerArgs`` record. Raises `SereError` for a runner that routes inside its
    kernel, and for what is not known unless that is allowed."""
    if not _on_gpu(record):
        return
    view = resolve(f"{_OVERRIDES}.resolved_view")(record)
    quantization, sm = quantization_of(view), _sm()
    runner = layer_runner(view.moe_runner_backend, quantization, sm)
    better = standard_runner(quantization, sm, _architecture(view))
    if runner == "auto":  # by scheme, all of them known; the layers are looked at again
        runner = "triton"
    known = RUNNERS.get(runner)
    if known is not None and known.ids == "inside":
        raise SereError(
            f"--moe-backend sere: --moe-runner-backend {runner} routes inside its kernel, where "
            f"nothing can be re-routed; use --moe-runner-backend {better}"
        )
    require_known(runner, view.moe_a2a_backend, allow_untested=allow_untested, instead=better)


def _architecture(view: Any) -> str:
    hf_config = resolve(f"{_OVERRIDES}.model_config_of")(view).hf_config
    return str((getattr(hf_config, "architectures", None) or [""])[0])


def quantization_of(view: Any) -> str | None:
    """SGLang's name of a model's quantization, by flag or by the checkpoint; None for bfloat16."""
    if view.quantization is not None:
        return str(view.quantization)
    stated = getattr(resolve(f"{_OVERRIDES}.model_config_of")(view), "quantization", None)
    return None if stated is None else str(stated)


def _asked(record: Any) -> str:
    """The flag as it was given."""
    raw: Mapping[str, Any] = getattr(record, "_raw_input", {})
    return str(raw.get("moe_runner_backend", record.moe_runner_backend))


def _on_gpu(record: Any) -> bool:
    return record.device != "cpu" and resolve("sglang.srt.runtime_context.get_platform")().is_cuda


def _sm() -> int:
    return int(resolve("sglang.srt.runtime_context.get_platform")().device_sm)
