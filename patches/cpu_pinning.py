"""Seam: pinned memory where there is no GPU: LoRA's, and a disaggregated server's host pool.

SGLang pins what it would copy to a GPU, on its CPU engine too, where torch refuses that for want of
a driver. Pinning changes no value: here it is left out.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from sere_sglang.patches.seam import check_parameters, resolve

_LORA = ("sglang.srt.lora.layers", "sglang.srt.lora.backend.torch_backend")
_POOL = "sglang.srt.mem_cache.pool_host.common"


def install(server_args: Any) -> None:
    """Before a scheduler of the CPU engine builds its model."""
    if torch.cuda.is_available():
        return
    if server_args.enable_lora:
        for name in _LORA:
            resolve(name).torch = _without_pinning()
        torch.Tensor.pin_memory = _as_it_is  # type: ignore[method-assign, assignment]
    if server_args.disaggregation_mode != "null":
        check_parameters(f"{_POOL}._cuda_host_register", ["buffer"])
        resolve(_POOL)._cuda_host_register = _register_nothing


def _without_pinning() -> types.ModuleType:
    """torch, whose constructors take ``pin_memory`` and do without."""
    module = types.ModuleType("torch", "without pinned memory")
    module.__getattr__ = lambda name: getattr(torch, name)  # type: ignore[method-assign]
    for name in ("tensor", "empty", "zeros", "arange"):
        setattr(module, name, _unpinned(getattr(torch, name)))
    return module


def _unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return make(*args, **kwargs)

    return made


def _as_it_is(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    return tensor


def _register_nothing(buffer: torch.Tensor, registration_granularity_bytes: Any = None) -> None:
    pass
