"""A stand-in for ``sgl_kernel`` on SGLang's CPU engine.

Seam: ``import sgl_kernel`` at the top of many SGLang modules. The wheel on
the package registry holds CUDA code only and cannot load without ``libcuda``; SGLang's CPU
build of it is not on the registry. With ``SGLANG_USE_CPU_ENGINE=1`` SGLang itself needs very
little of it when no AMX build is present: the operators below and in cpu_drafts.py. Every
other name imports and raises when called.

Registered under ``sglang.srt.platforms`` because that group is resolved in every process
before the first ``import sgl_kernel``; returning None activates no platform.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
import types
from typing import Any, NoReturn

import torch

from sere_sglang.patches import cpu_drafts

logger = logging.getLogger(__name__)

_library: torch.library.Library | None = None


def activate() -> None:
    """Entry point ``sglang.srt.platforms: sere-cpu-engine``; never claims to be a platform."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1" or "sgl_kernel" in sys.modules:
        return
    try:
        importlib.import_module("sgl_kernel")
    except ImportError as error:
        reason = _root_cause(error)
    else:
        return
    for name in [n for n in sys.modules if n == "sgl_kernel" or n.startswith("sgl_kernel.")]:
        del sys.modules[name]
    sys.modules["sgl_kernel"] = _build_module()
    _define_operators()
    logger.warning(
        "CPU engine: sgl_kernel cannot load here (%s); using sere-sglang's torch stand-in", reason
    )


def is_active() -> bool:
    """Whether this process runs on the stand-in instead of the real ``sgl_kernel``."""
    return _library is not None


def _root_cause(error: ImportError) -> str:
    lines = [line.strip("- ") for line in str(error).splitlines()]
    return next((line for line in lines if "lib" in line and "cannot open" in line), lines[0])


def _build_module() -> types.ModuleType:
    module = types.ModuleType("sgl_kernel", "sere-sglang stand-in for the CPU engine")
    real = importlib.machinery.PathFinder.find_spec("sgl_kernel")
    # Pure-Python submodules (scalar_type, version) are the real ones.
    module.__path__ = list(real.submodule_search_locations or []) if real else []
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
    for name, function in _FUNCTIONS.items():
        setattr(module, name, function)
    module.__getattr__ = _missing  # type: ignore[method-assign]
    return module


def _missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def unavailable(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} is not part of the CPU stand-in; install SGLang's CPU build "
            "of sgl_kernel to use the feature that needs it"
        )

    return unavailable


def _define_operators() -> None:
    global _library
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define(
        "topk_softmax_cpu(Tensor hidden_states, Tensor gating_output, int topk, "
        "bool renormalize, Tensor? correction_bias=None) -> (Tensor, Tensor)"
    )
    library.impl("topk_softmax_cpu", _topk_softmax, "CPU")
    library.define(
        "reconstruct_indices_from_tree_mask_cpu(Tensor tree_mask, Tensor verified_seq_len, "
        "Tensor(a!) positions, Tensor(b!) retrive_index, Tensor(c!) retrive_next_token, "
        "Tensor(d!) retrive_next_sibling, int batch_size, int draft_token_num) -> ()"
    )
    tree = cpu_drafts.reconstruct_indices_from_tree_mask
    library.impl("reconstruct_indices_from_tree_mask_cpu", tree, "CPU")
    _library = library


def _topk_softmax(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax router: gating_output [T, E] -> weights float32 [T, K], ids int32 [T, K]."""
    scores = torch.softmax(gating_output.float(), dim=-1)
    choice = scores if correction_bias is None else scores + correction_bias
    ids = torch.topk(choice, topk, dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, ids.to(torch.int32)


def _assign_req_to_token_pool(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    _pool_len: int,
) -> None:
    """Write each request's new cache slots into its row of the pool (one row per request)."""
    for row, window, place in cpu_drafts.windows(req_pool_indices, start_offset, end_offset):
        req_to_token[row, window] = out_cache_loc[place]


def _copy_all_layer_kv_cache(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Move whole cache rows src_loc -> tgt_loc in every layer buffer (addresses, byte strides)."""
    import ctypes

    moves = list(zip(tgt_loc.tolist(), src_loc.tolist(), strict=True))
    for base, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(base + src * stride, stride) for _, src in moves]
        for (target, _), row in zip(moves, rows, strict=True):
            ctypes.memmove(base + target * stride, row, stride)


_FUNCTIONS = {
    "assign_req_to_token_pool_cpu": _assign_req_to_token_pool,
    "copy_all_layer_kv_cache_cpu": _copy_all_layer_kv_cache,
    "assign_extend_cache_locs_cpu": cpu_drafts.assign_extend_cache_locs,
    "verify_tree_greedy_cpu": cpu_drafts.verify_tree_greedy,
    "fill_accept_out_cache_loc_cpu": cpu_drafts.fill_accept_out_cache_loc,
}
"""Attribute of the stand-in -> what it is."""
