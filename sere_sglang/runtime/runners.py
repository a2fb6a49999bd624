"""Which of SGLang's MoE runners take a row that holds one expert twice.

Read in SGLang 0.5.23 and the kernels that it calls; none was run on a GPU. A runner that is not
listed gets distinct rows (docs/semantics.md, rule 8), which suit all of them.
"""

from __future__ import annotations

from typing import Any

TAKE_REPEATED_IDS = {
    "triton": "moe_align_block_size counts slots, and align_single_token breaks ties by slot",
    "marlin": "sorted by the same moe_align_block_size",
    "cutlass": "prepare_moe_input places each slot by itself",
}
"""``MoeRunnerBackend`` value -> why. Not: deep_gemm's masked layout and flashinfer_*, which lose
weights or write out of bounds where an expert has more slots than the batch has rows."""


def takes_repeated_ids(layer: Any) -> bool:
    """Whether a ``FusedMoE`` computes the same sum if slots of a row that met stay apart.

    Distinct rows cost a GPU something where A, what the batch runs, has fewer than K members:
    surplus slots then name experts outside it, which are loaded although their weight is 0.
    """
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher

    runner = getattr(layer.quant_method, "runner", None)
    backend = getattr(getattr(runner, "runner_backend", None), "value", None)
    # Dispatchers between ranks count rows by expert.
    return backend in TAKE_REPEATED_IDS and type(layer.dispatcher) is StandardDispatcher
