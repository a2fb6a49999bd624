"""Seam: ``get_parallel``, ``is_moe_input_scattered_across_dp_ranks``: whose rows a MoE
layer's top-k sees.

SGLang gathers or scatters hidden states between attention and the MoE block, top-k included:

    plain TP, PP, EP                      every rank: the batch
    --attn-dp-size > 1                    every rank: the batches of all DP groups, each followed
                                          by its padding
    all-to-all (DeepEP ...), one rank     each rank: its own batch
    per attention group
    all-to-all, several such ranks        each rank: a slice of its group's batch
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from sere_sglang.errors import SereError
from sere_sglang.options import SereConfig
from sere_sglang.patches.seam import resolve
from sere_sglang.runtime.runners import DISPATCHERS
from sere_sglang.schedule.composition import MoeRows

logger = logging.getLogger(__name__)

_DP_ATTENTION = "--attn-dp-size > 1 (--enable-dp-attention)"
_SCATTERED = "sglang.srt.layers.moe.utils.is_moe_input_scattered_across_dp_ranks"


def moe_rows() -> MoeRows:
    """In a worker whose parallel groups are up."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if resolve(_SCATTERED)():
        return MoeRows.SLICE if parallel.attn_tp_size > 1 else MoeRows.OWN
    return MoeRows.GATHERED if parallel.attn_dp_enabled else MoeRows.OWN


def restrict(record: Any, asked: SereConfig) -> SereConfig:
    """In the launcher: what the flags of a resolved ``ServerArgs`` record leave of `asked`.

    Where rows of other ranks stand among a rank's own, it does not know what their requests asked
    for. Per-request quality is then off; asking for it by flag raises `SereError`.
    """
    flags = resolve("sglang.srt.arg_groups.overrides.resolved_view")(record)
    groups = flags.attn_dp_size  # --enable-dp-attention sets it too
    if groups > 1 and flags.enable_dp_attention_local_control_broadcast:
        raise SereError(
            f"{_DP_ATTENTION}: with --enable-dp-attention-local-control-broadcast (SGLang sets it "
            "for elastic EP and its Rust server) what rank 0 measures does not reach the other DP "
            "groups, which would decide differently; drop that flag or --moe-backend sere"
        )
    dispatcher = DISPATCHERS.get(flags.moe_a2a_backend)
    if dispatcher is not None and dispatcher.rows == "global":
        return without_quality(asked, _DP_ATTENTION) if groups > 1 else asked
    if flags.tp_size > groups:
        return without_quality(asked, "--moe-a2a-backend and several ranks per attention group")
    return asked


def without_quality(asked: SereConfig, flag: str) -> SereConfig:
    """Every request is balanced, and one that asks for something else is refused."""
    for name in ("sere_quality", "sere_allow_quality"):
        value = getattr(asked, name)
        if value not in (None, "balanced"):
            raise SereError(
                f"--{name.replace('_', '-')} {value}: per-request quality is not available with "
                f"{flag}, where a rank routes rows without knowing their requests; drop one"
            )
    logger.info("SERE: every request is 'balanced' with %s", flag)
    return dataclasses.replace(asked, sere_allow_quality="balanced")


def require_no_quality(allowed: tuple[str, ...]) -> None:
    """In a worker, for layouts that `restrict` cannot tell from flags. Raises `SereError`."""
    rows = moe_rows()
    if rows is not MoeRows.OWN and allowed != ("balanced",):
        raise SereError(
            f"--sere-allow-quality {','.join(allowed)}: per-request quality is not available here, "
            f"as MoE layers see {rows.value}; add --sere-allow-quality balanced"
        )
