"""`apply_rule`: every published rule of which experts a batch loads, behind one function."""

from __future__ import annotations

import functools
import logging
from typing import Protocol, cast

import torch

from sere_sglang.ops import registry
from sere_sglang.ops.jit import BuildError
from sere_sglang.ops.reference.reroute import expert_set
from sere_sglang.ops.registry import UnavailableError
from sere_sglang.ops.rules_call import Routed, RuleCall
from sere_sglang.ops.rules_check import checked

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = {
    "torch": "sere_sglang.ops.reference.rules",
    "cpu": "sere_sglang.ops.cpu.rules",
    "triton": "sere_sglang.ops.triton.rules",
    "cuda": "sere_sglang.ops.cuda.rules",
}
"""Name -> module with ``is_available`` and ``build`` as in `dispatch`, and ``apply``."""

PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
"""Device type -> the order in which ``auto`` tries, before torch. On a GPU Triton is first because
it is what servers capture in their graphs; neither has been measured on one yet."""


class Implementation(Protocol):
    def is_available(self, device_type: str) -> str | None: ...

    def build(self) -> None: ...

    def apply(self, call: RuleCall, counters: torch.Tensor | None = None) -> Routed:
        """`apply_rule` of arguments that were checked.

        counters: int64 ``[7]`` to add to: `COUNTER_FIELDS`, where experts of weight 0 are not
            active after it, then the squared weight that was lost, times `RuleCall.expert_loss`,
            per valid row, in units of 2^-32; fast rows lose nothing that counts.
        """
        ...


def apply_rule(
    rule: str,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    scores: torch.Tensor | None = None,
    similarity: torch.Tensor | None = None,
    primary_k: int | None = None,
    threshold: float = 0.0,
    k0: int | None = None,
    budget: int | None = None,
    warmup: bool = True,
    fill: str = "piggyback",
    loss: float | None = None,
    fill_weight: float = 0.0,
    renormalize: float = 0.0,
    num_valid: int | None = None,
    protected: torch.Tensor | None = None,
    impl: str = "auto",
) -> Routed:
    """Choose the experts that one layer loads, A, and what its rows get instead of the others.

    Rules: ``similarity`` (SERE), ``piggyback`` (OEA, arXiv 2511.02237), ``budget`` (XShare,
    2602.07265; with ``fill="truncate"`` MoE-Spec, 2602.16052), ``topk`` and ``energy`` (ours);
    docs/semantics.md says exactly what each does. What a rule does not need changes nothing, but a
    tensor that is given is checked.

    Args:
        rule: one of those five.
        topk_ids: int32 or int64 ``[T, K]``, distinct within a row; -1 marks an empty slot.
        topk_weights: floating ``[T, K]``, the routing weights as the layer uses them.
        scores: floating ``[T, E]``, >= 0: softmax or sigmoid of all router logits, before top-k.
            For ``piggyback``, ``budget`` and a `fill_weight`; ``topk`` and ``energy`` take E from
            them (or from `similarity`).
        similarity: floating ``[E, E]``, for ``similarity``.
        primary_k, threshold: S and rho of ``similarity``, as in `reroute`.
        k0: in [1, K): slots of a row that are sure of their expert, for ``piggyback``, ``topk``.
        budget: B in [1, E], experts that ``budget`` loads.
        warmup: ``budget`` loads every row's best expert first, beyond B if need be.
        fill: of ``budget``: ``piggyback``, a row takes its best of A; ``truncate``, only its own.
        loss: in [0, 1]: the energy, in weight squared per valid row, that ``energy`` may drop.
        fill_weight: a >= 0: ``energy`` gives lost slots the row's next best of A with a times the
            weight that the router would give it. 0 drops them.
        renormalize: gamma in [0, 1]: ``energy`` multiplies a row that lost a slot by
            (original mass / new mass)^gamma.
        num_valid: rows from this one on are padding and repeat a valid row; None for none.
        protected: bool ``[T]``; such a row loads all its experts and is left as it is.
        impl: ``auto``, ``torch``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        `Routed`, new tensors. ``similarity`` with S <= 0 or S >= K changes nothing, and has no
        ``lost``.

    Raises:
        ValueError, TypeError: arguments that do not fit, naming the argument.
        RuntimeError: `impl` does not serve this device or does not build here.
    """
    call = checked(
        rule, topk_ids, topk_weights, scores=scores, similarity=similarity, primary_k=primary_k,
        threshold=threshold, k0=k0, budget=budget, warmup=warmup, fill=fill, loss=loss,
        fill_weight=fill_weight, renormalize=renormalize, num_valid=num_valid, protected=protected,
    )  # fmt: skip
    return applied(call, impl)


def applied(call: RuleCall, impl: str = "auto") -> Routed:
    """`apply_rule` of arguments that were checked (`rules_check.checked`)."""
    implementation = load_rules(impl, call.ids.device.type)
    nothing = call.ids.numel() == 0 or call.is_off
    return _untouched(call) if nothing else implementation.apply(call)


def load_rules(impl: str, device_type: str) -> Implementation:
    """The module behind `impl`, built; ``auto`` is the first of `PREFERENCE` that builds, or torch.

    Raises:
        ValueError: no such name.
        RuntimeError: it does not serve this device or does not build here.
    """
    if impl != "auto":
        return _load(impl, device_type)
    return _load(_auto(device_type), device_type)


@functools.cache
def _auto(device_type: str) -> str:
    passed_over = []
    for name in PREFERENCE.get(device_type, ()):
        try:
            _load(name, device_type)
        except (BuildError, UnavailableError) as error:
            passed_over.append(str(error))
            continue
        break
    else:
        name = "torch"
    if passed_over:
        logger.warning("the rules run in %s: %s", name, "; ".join(passed_over))
    return name


@functools.cache
def _load(name: str, device_type: str) -> Implementation:
    return cast(Implementation, registry.load(IMPLEMENTATIONS, name, device_type))


def _untouched(call: RuleCall) -> Routed:
    ids = call.ids[: call.num_valid].to(torch.int64)
    active = expert_set(ids, (ids >= 0) & (ids < call.num_experts), call.num_experts)
    lost = torch.zeros(len(call.ids), call.num_experts, device=ids.device)
    return Routed(call.ids.clone(), call.weights.clone(), active, None if call.is_off else lost)
