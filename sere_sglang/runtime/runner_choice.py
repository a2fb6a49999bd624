"""Which standard-format runner a model gets where SGLang would pick one that routes in its kernel.

From what SGLang 0.5.23 resolves before a weight loads, and what its quantization methods make of
"auto" afterwards (``create_moe_runner`` of each, ``layers/quantization``). docs/runners.md shows
both for the common models, from SGLang's own resolution.
"""

from __future__ import annotations

from sere_sglang.runtime.runners import RUNNERS

_NVFP4 = ("modelopt_fp4", "modelopt_mixed")
_TRTLLM_ROUTED = (None, "fp8", "mxfp8", *_NVFP4, "nvfp4_online", "minimax_m3_nvfp4")
"""What ``flashinfer_trtllm_routed`` takes (``arg_groups/moe_hook.py``)."""
_NOT_TRTLLM = (
    "GptOssForCausalLM",
    "InternS2MobiusForConditionalGeneration",
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
)
"""Architectures with experts that its bfloat16 kernel does not compute (``moe_runner/
flashinfer_trtllm.py``: activations), that SGLang gives ``triton_kernel`` everywhere, or whose
softmax is not renormalized (`moe_layers.require_probabilities`)."""
_TRTLLM_GENERATION = range(100, 110)  # the GPUs that its kernels are made for


def layer_runner(resolved: str, quantization: str | None, sm: int) -> str:
    """The runner of a layer whose ``--moe-runner-backend`` has resolved to `resolved`.

    quantization: SGLang's name, None for bfloat16. sm: compute capability, 90 for 9.0. What stays
    "auto" are methods that choose by scheme; all they choose from takes standard top-k.
    """
    if resolved != "auto":
        return resolved
    if quantization in _NVFP4:
        return "marlin" if 80 <= sm < 100 else "flashinfer_trtllm"
    if quantization in ("awq", "awq_marlin", "gptq", "gptq_marlin"):
        return "marlin"
    return "auto" if quantization == "compressed-tensors" else "triton"


def standard_runner(quantization: str | None, sm: int, architecture: str = "") -> str:
    """The best ``--moe-runner-backend`` that takes standard top-k, of those that this model has.

    On SM100 that is ``flashinfer_trtllm_routed``: ``flashinfer_trtllm``'s kernels, fed with ids.
    """
    takes = quantization in _TRTLLM_ROUTED and architecture not in _NOT_TRTLLM
    if takes and sm in _TRTLLM_GENERATION:
        return "flashinfer_trtllm_routed"
    if quantization in _NVFP4:
        return "marlin" if sm < 100 else "flashinfer_cutlass"
    if quantization == "mxfp4":  # of its methods, marlin alone keeps four bits and takes ids
        return "marlin"
    return layer_runner("auto", quantization, sm)


def instead(resolved: str, quantization: str | None, sm: int, architecture: str = "") -> str | None:
    """What to run in place of what SGLang chose by itself; None where that takes standard top-k."""
    chosen = layer_runner(resolved, quantization, sm)
    known = RUNNERS.get(chosen)
    if known is None or known.ids != "inside":
        return None
    return standard_runner(quantization, sm, architecture)


def calibration_runner(resolved: str, quantization: str | None, sm: int) -> str | None:
    """What to calibrate on in place of `resolved`: a runner that takes any ids in any shape, as
    each expert is given every row; None where that is one already."""
    chosen = layer_runner(resolved, quantization, sm)
    known = RUNNERS.get(chosen)
    if chosen == "auto" or (known is not None and known.ids == "repeated"):
        return None
    return "marlin" if quantization in (*_NVFP4, "mxfp4") else "triton"
