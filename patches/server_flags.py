"""Seam: fields of a resolved ``ServerArgs`` record under which re-routing would be wrong.

Checked in the launcher, before a weight loads. Read in SGLang's sources, see the reasons; what
these flags need of a GPU was not run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sglang.srt.environ import envs

from sere_sglang.errors import SereError
from sere_sglang.option import flag_of
from sere_sglang.patches.seam import resolve

_BY_BATCH = "the experts of a token would depend on the batch that it happens to be in"
_REPLACED = "the model's forward is replaced by a kernel that routes by itself"

UNSUPPORTED = {
    "enable_two_batch_overlap": "each layer runs on two halves of a batch, which would be "
    "re-routed as two batches under the qualities of the first one's requests",
    "enable_pdmux": "prefill and decode run at the same time, and would run at one operating point",
    "enable_deterministic_inference": _BY_BATCH,
    "rl_on_policy_target": _BY_BATCH,
    "enable_nvidia_megakernel": _REPLACED,
    "enable_amd_monokernel": _REPLACED,
    "dllm_algorithm": "a diffusion model decodes by what SGLang calls prefills, which are never "
    "re-routed",
}
"""Field that is set -> why SERE is refused."""

_PARTS = "whose rows a MoE layer then sees has not been followed"
ONE_ALONE = {
    "attn_cp_size": _PARTS,
    "moe_dp_size": _PARTS,
    "dwdp_size": _PARTS,
}
"""Field that may not be above 1 -> why."""


_FUSED_FRONT = ("KimiK3ForConditionalGeneration", "KimiK3LinearForCausalLM")
"""Architectures that choose experts in one kernel with the GEMM before it, unless they are told not
to (``models/kimi_k3.py``, ``_ep_front``)."""


def require_supported(record: Any, architectures: Sequence[str] = ()) -> None:
    """Raise `SereError`, naming flag and reason, for what cannot be served with SERE.
    architectures: of the model."""
    flags = resolve("sglang.srt.arg_groups.overrides.resolved_view")(record)
    for name, reason in UNSUPPORTED.items():
        if getattr(flags, name):
            raise SereError(
                f"--moe-backend sere: with {flag_of(name)} {reason}; drop one of the two"
            )
    for name, reason in ONE_ALONE.items():
        if getattr(flags, name) > 1:
            raise SereError(
                f"--moe-backend sere: with {flag_of(name)} above 1 {reason}; drop one of the two"
            )
    if envs.SGLANG_ENABLE_CUDA_GRAPH_DEDUP.get():
        raise SereError(
            "--moe-backend sere: SGLANG_ENABLE_CUDA_GRAPH_DEDUP compares kernels of CUDA graphs "
            "without what ours are launched with, and could take two for one; set it to 0"
        )
    mode = envs.SGLANG_RAGGED_VERIFY_MODE.get()
    if mode != "static":
        raise SereError(
            f"--moe-backend sere: with SGLANG_RAGGED_VERIFY_MODE={mode} a verify batch has padding "
            "rows that look like tokens; leave it static, or drop --moe-backend sere"
        )
    if envs.SGLANG_EXPERIMENTAL_LORA_OPTI.get() and _is_on("SGLANG_OPT_LORA_FUSED_TOPK_PACK"):
        raise SereError(
            "--moe-backend sere: with SGLANG_EXPERIMENTAL_LORA_OPTI the runner gets packed ids, "
            "which cannot be re-routed; set SGLANG_OPT_LORA_FUSED_TOPK_PACK=0"
        )
    if set(architectures) & set(_FUSED_FRONT) and envs.SGLANG_K3_FUSED_FRONT.get():
        raise SereError(
            f"--moe-backend sere: {architectures[0]} chooses experts inside a kernel that cannot "
            "be re-routed; set SGLANG_K3_FUSED_FRONT=0"
        )


def _is_on(variable: str) -> bool:
    """As SGLang's ``lora/trtllm_lora_temp/environ.py`` reads it: unset is on."""
    return os.environ.get(variable, "1").strip().lower() in ("1", "true", "yes", "on")
