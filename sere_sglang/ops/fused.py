"""Softmax top-k and re-routing in one launch, for routers that are a plain softmax.

Then SERE adds no launch to a layer. Where the CUDA kernel does not serve, the same result comes
from top-k in torch and `reroute_`.
"""

from __future__ import annotations

import functools
import logging

import torch

from sere_sglang.ops.control import CONTROL_WORDS
from sere_sglang.ops.cuda import library
from sere_sglang.ops.cuda import reroute as cuda
from sere_sglang.ops.cuda.plan import plan_fused
from sere_sglang.ops.dispatch import select_impl
from sere_sglang.ops.jit import BuildError
from sere_sglang.ops.registry import UnavailableError
from sere_sglang.ops.reroute import MAX_TOP_K, check_arguments, reroute_
from sere_sglang.ops.table import LayerTable

logger = logging.getLogger(__name__)

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = ("auto", "torch", "cuda")


def fused_topk_reroute(
    router_logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    table: LayerTable,
    control: torch.Tensor,
    *,
    row_class: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    distinct: bool = True,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's experts by softmax of its logits, then re-route as `reroute_` does.

    Args:
        router_logits: ``[T, E]``, float32, bfloat16 or float16, unit stride within a row. Equal
            logits rank by expert, lowest first, as in SGLang's router.
        top_k: K, experts per token, at most 32.
        renormalize: divide the K weights by their sum.
        table: of the layer, E experts, on the same device.
        control: int32 ``[16]`` (`encode_control`), on the same device.
        row_class: uint8 ``[>= T]`` or None (every row is of class 0).
        counters: int64 ``[6]`` to add to (`COUNTER_FIELDS`), or None.
        distinct: rows hold no expert twice, as `reroute_` says.
        impl: ``cuda``, ``torch``, or ``auto``: cuda where `select_impl` names it.

    Returns:
        weights float32 ``[T, K]`` and ids int32 ``[T, K]``, new.

    Raises:
        ValueError: arguments that do not fit, naming the argument.
    """
    weights, ids = torch.ops.sere.fused_topk_reroute.default(
        router_logits,
        top_k,
        renormalize,
        table.similarity,
        table.neighbors,
        table.scale,
        control,
        row_class,
        counters,
        distinct,
        impl,
    )
    return weights, ids


def softmax_topk(
    router_logits: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: weights float32 and ids int32 ``[T, K]``, best first, ties lowest id first."""
    logits = router_logits.float()
    order = logits.nan_to_num(nan=-1e30, posinf=torch.inf, neginf=-torch.inf)
    ids = order.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = order.softmax(dim=-1).gather(1, ids)
    if renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / total.where(total > 0, 1.0)
    return weights, ids.to(torch.int32)


@functools.cache
def build() -> None:
    """Compile the CUDA kernel now and launch it once; raises `BuildError`."""
    device = torch.device("cuda", torch.cuda.current_device())
    library.load_function("fused")
    logits = torch.zeros(1, 2, device=device)
    switched_off = torch.zeros(CONTROL_WORDS, dtype=torch.int32, device=device)
    table = LayerTable(torch.eye(2, device=device))
    weights, ids = new_slots(logits, 1)
    try:
        _launch(logits, True, weights, ids, table, switched_off, None, None, True)
    except RuntimeError as error:
        raise BuildError(f"fused was built but does not launch: {error}") from error


def _launch(
    router_logits: torch.Tensor,
    renormalize: bool,
    weights: torch.Tensor,
    ids: torch.Tensor,
    table: LayerTable,
    control: torch.Tensor,
    row_class: torch.Tensor | None,
    counters: torch.Tensor | None,
    distinct: bool,
) -> None:
    has_clusters = library.has_clusters(ids.device)
    plan = plan_fused(ids.shape[0], table.num_experts, has_clusters)
    operands = cuda.operands(weights, ids, table, control, row_class, counters, distinct)
    launch = cuda.launch_operands(plan, ids.device, has_clusters)
    library.load_function("fused")(router_logits, renormalize, *operands, *launch)


@functools.cache
def uses_cuda(strict: bool = False) -> bool:
    """Whether ``impl="auto"`` takes the CUDA kernel on this machine's GPU, building it now.

    Raises:
        BuildError: strict, and it does not build. Otherwise a warning has the compiler's error.
    """
    if select_impl("cuda", strict) != "cuda":
        return False
    try:
        build()
    except BuildError as error:
        if strict:
            raise
        logger.warning("fused top-k and re-routing does not build, top-k runs apart: %s", error)
        return False
    return True


def _chooses_cuda(impl: str, device: torch.device) -> bool:
    if impl not in IMPLEMENTATIONS:
        choices = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"unknown fused implementation {impl!r}; choose one of: {choices}")
    if impl == "auto":
        return device.type == "cuda" and uses_cuda()
    if impl == "cuda":
        reason = library.is_available(device.type)
        if reason is not None:
            raise UnavailableError(f"cuda: {reason}")
        build()
    return impl == "cuda"


def _op(
    router_logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    similarity: torch.Tensor,
    neighbors: torch.Tensor | None,
    scale: torch.Tensor | None,
    control: torch.Tensor,
    row_class: torch.Tensor | None,
    counters: torch.Tensor | None,
    distinct: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    table = LayerTable(similarity, neighbors, scale)
    check_logits(router_logits, top_k, table.num_experts)
    weights, ids = new_slots(router_logits, top_k)
    check_arguments(ids, weights, table, control, row_class, counters)
    on_cuda = _chooses_cuda(impl, router_logits.device)
    if ids.numel() == 0:
        return weights, ids
    if on_cuda:
        _launch(
            router_logits, renormalize, weights, ids, table, control, row_class, counters, distinct
        )
        return weights, ids
    weights, ids = softmax_topk(router_logits, top_k, renormalize)
    name = "torch" if impl == "torch" else "auto"
    reroute_(
        ids,
        weights,
        table,
        control,
        row_class=row_class,
        counters=counters,
        distinct=distinct,
        impl=name,
    )
    return weights, ids


def _op_fake(
    router_logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    similarity: torch.Tensor,
    neighbors: torch.Tensor | None,
    scale: torch.Tensor | None,
    control: torch.Tensor,
    row_class: torch.Tensor | None,
    counters: torch.Tensor | None,
    distinct: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    table = LayerTable(similarity, neighbors, scale)
    check_logits(router_logits, top_k, table.num_experts)
    weights, ids = new_slots(router_logits, top_k)
    check_arguments(ids, weights, table, control, row_class, counters)
    return weights, ids


def new_slots(router_logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for weights float32 and ids int32 ``[T, K]``."""
    shape = (router_logits.shape[0], top_k)
    weights = torch.empty(shape, dtype=torch.float32, device=router_logits.device)
    return weights, torch.empty(shape, dtype=torch.int32, device=router_logits.device)


def check_logits(router_logits: torch.Tensor, top_k: int, num_experts: int) -> None:
    """Raises ValueError, naming the argument, where a fused kernel would not take them."""
    if router_logits.dim() != 2 or router_logits.shape[1] != num_experts:
        raise ValueError(
            f"router_logits must be [T, E={num_experts}], got {list(router_logits.shape)}"
        )
    if router_logits.dtype not in LOGIT_DTYPES:
        raise ValueError(f"router_logits must be one of {LOGIT_DTYPES}, got {router_logits.dtype}")
    if num_experts > 1 and router_logits.stride(1) != 1:
        raise ValueError(
            f"router_logits must have unit stride within a row, got {router_logits.stride()}"
        )
    if not 1 <= top_k <= min(MAX_TOP_K, num_experts):
        raise ValueError(f"top_k must be 1 to {MAX_TOP_K} and at most E={num_experts}, got {top_k}")


_library = torch.library.Library("sere", "FRAGMENT")
_library.define(
    "fused_topk_reroute(Tensor router_logits, int top_k, bool renormalize, Tensor similarity, "
    "Tensor? neighbors, Tensor? scale, Tensor control, Tensor? row_class, "
    "Tensor(a!)? counters, bool distinct, str impl) -> (Tensor, Tensor)"
)
_library.impl("fused_topk_reroute", _op, "CompositeExplicitAutograd")
torch.library.register_fake("sere::fused_topk_reroute", _op_fake, lib=_library)
