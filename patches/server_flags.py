"""Seam: fields of a resolved ``ServerArgs`` record under which re-routing would be wrong.

Checked in the launcher, before a weight loads. Read in SGLang's sources, see the reasons; what
these flags need of a GPU was not run.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.environ import envs

from sere_sglang.errors import SereError
from sere_sglang.options import flag_of
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


def require_supported(record: Any) -> None:
    """Raise `SereError`, naming flag and reason, for what cannot be served with SERE."""
    flags = resolve("sglang.srt.arg_groups.overrides.resolved_view")(record)
    for name, reason in UNSUPPORTED.items():
        if getattr(flags, name):
            raise SereError(
                f"--moe-backend sere: with {flag_of(name)} {reason}; drop one of the two"
            )
    mode = envs.SGLANG_RAGGED_VERIFY_MODE.get()
    if mode != "static":
        raise SereError(
            f"--moe-backend sere: with SGLANG_RAGGED_VERIFY_MODE={mode} a verify batch has padding "
            "rows that look like tokens; leave it static, or drop --moe-backend sere"
        )
