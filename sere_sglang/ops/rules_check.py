"""The arguments of `apply_rule`: what does not fit is refused by name."""

from __future__ import annotations

import numbers

import torch

from sere_sglang.names import RULES
from sere_sglang.ops.checks import whole_number
from sere_sglang.ops.reroute import MAX_TOP_K
from sere_sglang.ops.rules_call import FILLS, MAX_ROWS, RuleCall
from sere_sglang.ops.table import MAX_EXPERTS


def checked(
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
    fast: torch.Tensor | None = None,
    fast_k: int = 1,
    expert_loss: torch.Tensor | None = None,
) -> RuleCall:
    """The arguments of `apply_rule`, checked, as implementations take them; and three of servers.

    fast: bool ``[T]``; such a row is sure of its `fast_k` best experts only and has no say in what
        else is loaded; not for ``similarity``. fast_k: in [1, K).
    expert_loss: floating ``[E]``, >= 0: what an expert's squared weight is multiplied by under
        ``energy``; None for 1. Servers take it from `profile.loss_shares`.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is none of: {', '.join(RULES)}")
    if fill not in FILLS:
        raise ValueError(f"fill {fill!r} is none of: {', '.join(FILLS)}")
    a = _fraction("fill_weight", fill_weight, None)
    truncate = rule == "budget" and fill == "truncate"
    takes_scores = rule in ("piggyback", "budget") or (rule == "energy" and a > 0.0)
    needed: dict[str, dict[str, object]] = {
        "similarity": {"similarity": similarity, "primary_k": primary_k},
        "piggyback": {"scores": scores, "k0": k0},
        "budget": {"scores": scores, "budget": budget},
        "topk": {"k0": k0},
        "energy": {"loss": loss} | ({"scores": scores} if takes_scores else {}),
    }
    for name, value in needed[rule].items():
        if value is None:
            raise ValueError(f"{name} is missing: rule {rule!r} needs {name}=")
    if scores is None and similarity is None:
        raise ValueError(f"scores is missing: rule {rule!r} takes E from scores [T, E]")
    _check_tensors(topk_ids, topk_weights, scores, similarity, expert_loss, protected, fast)
    num_rows, top_k = topk_ids.shape
    table = similarity if scores is None else scores
    assert table is not None
    num_experts = table.shape[1]
    if num_experts == 0:
        name = "similarity" if scores is None else "scores"
        raise ValueError(f"{name} has no experts: its last dimension is 0")
    if num_experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        raise ValueError(
            f"topk_ids: at most {MAX_EXPERTS} experts and top-{MAX_TOP_K} are supported, "
            f"got E={num_experts}, K={top_k}"
        )
    if num_rows > MAX_ROWS:
        raise ValueError(f"topk_ids has {num_rows} rows; at most {MAX_ROWS}: split the batch")
    weights = _floats(topk_weights)  # what is finite as a float64 may not be as a float32
    scores, similarity, expert_loss = (
        None if table is None else _floats(table) for table in (scores, similarity, expert_loss)
    )
    _check_values_on_cpu(topk_ids, weights, num_experts, scores, similarity, expert_loss)
    valid = num_rows if num_valid is None else whole_number("num_valid", num_valid)
    if not 0 <= valid <= num_rows:
        raise ValueError(f"num_valid must be in [0, T={num_rows}], got {num_valid}")

    keep = 1
    if rule == "similarity":
        keep = whole_number("primary_k", primary_k)
    elif rule in ("piggyback", "topk"):
        keep = whole_number("k0", k0)
        if not 1 <= keep < top_k:
            raise ValueError(f"k0 must be in [1, K={top_k}), got {keep}; k0 >= K is plain routing")
    fast_keep = 1
    if fast is not None:
        if rule == "similarity":
            raise ValueError("fast is not for rule 'similarity'; protect rows, or split the batch")
        fast_keep = whole_number("fast_k", fast_k)
        if not 1 <= fast_keep <= max(1, top_k - 1):
            raise ValueError(f"fast_k must be in [1, K={top_k}), got {fast_k}")
    experts = whole_number("budget", budget) if rule == "budget" else num_experts
    if not 1 <= experts <= num_experts:
        raise ValueError(f"budget must be in [1, E={num_experts}], got {experts}")

    return RuleCall(
        rule=rule,
        ids=topk_ids.to(torch.int32).contiguous(),
        weights=weights,
        num_experts=num_experts,
        num_valid=valid,
        protected=None if protected is None else protected.contiguous(),
        fast=None if fast is None else fast.contiguous(),
        scores=scores if takes_scores else None,
        similarity=similarity if rule == "similarity" else None,
        expert_loss=expert_loss if rule == "energy" else None,
        keep=keep,
        fast_keep=fast_keep,
        threshold=_fraction("threshold", threshold),
        budget=experts,
        warmup=bool(warmup),
        truncate=truncate,
        loss=_fraction("loss", loss) if loss is not None and rule == "energy" else 0.0,
        fill_weight=a,
        renormalize=_fraction("renormalize", renormalize),
    )


def _floats(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _fraction(name: str, value: object, highest: float | None = 1.0) -> float:
    """A number in [0, highest], rounded to float32 as a kernel holds it."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not 0.0 <= number <= (highest or 1e6):  # NaN fails too
        bounds = f"[0, {highest:g}]" if highest else "[0, 1e6]"
        raise ValueError(f"{name} must be in {bounds}, got {value}")
    return float(torch.tensor(number, dtype=torch.float32))


def _check_tensors(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    scores: torch.Tensor | None,
    similarity: torch.Tensor | None,
    expert_loss: torch.Tensor | None,
    protected: torch.Tensor | None,
    fast: torch.Tensor | None,
) -> None:
    if not isinstance(topk_ids, torch.Tensor):
        raise TypeError(f"topk_ids must be a torch.Tensor, got {type(topk_ids).__name__}")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if topk_ids.dim() != 2:
        raise ValueError(f"topk_ids must be [T, K], got {list(topk_ids.shape)}")
    given = {
        "topk_weights": topk_weights,
        "scores": scores,
        "similarity": similarity,
        "expert_loss": expert_loss,
        "protected": protected,
        "fast": fast,
    }
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or name == "topk_weights"):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    num_rows, top_k = topk_ids.shape
    if similarity is not None and similarity.dim() != 2:
        raise ValueError(f"similarity must be square [E, E], got {list(similarity.shape)}")
    if scores is not None and scores.dim() != 2:
        raise ValueError(f"scores must be [T={num_rows}, E], got {list(scores.shape)}")
    experts = scores.shape[1] if scores is not None else similarity.shape[1]  # type: ignore[union-attr]
    shapes = {
        "topk_weights": (topk_weights, "[T, K]", [num_rows, top_k]),
        "scores": (scores, "[T, E]", [num_rows, experts]),
        "similarity": (similarity, "[E, E]", [experts, experts]),
        "expert_loss": (expert_loss, "[E]", [experts]),
        "protected": (protected, "bool [T]", [num_rows]),
        "fast": (fast, "bool [T]", [num_rows]),
    }
    for name, (tensor, form, shape) in shapes.items():
        if tensor is None:
            continue
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {form} = {shape}, got {list(tensor.shape)}")
        if tensor.device != topk_ids.device:
            raise ValueError(f"{name} is on {tensor.device}, topk_ids on {topk_ids.device}")
        if name in ("protected", "fast"):
            if tensor.dtype != torch.bool:
                raise ValueError(f"{name} must be {form}, got {tensor.dtype}")
        elif not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def _check_values_on_cpu(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    scores: torch.Tensor | None,
    similarity: torch.Tensor | None,
    expert_loss: torch.Tensor | None,
) -> None:
    """Value checks, only where reading values does not synchronize a device."""
    if topk_ids.device.type != "cpu" or topk_ids.numel() == 0:
        return
    lowest, highest = (int(end) for end in torch.aminmax(topk_ids))
    if lowest < -1 or highest >= num_experts:
        raise ValueError(
            f"topk_ids must be -1 or in [0, E={num_experts}), found {lowest} to {highest}"
        )
    ordered = topk_ids.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        row = int(twice.any(dim=1).to(torch.uint8).argmax())
        raise ValueError(f"topk_ids holds an expert twice in row {row}")
    if not bool(torch.isfinite(topk_weights).all()):
        raise ValueError("topk_weights contains NaN or infinity")
    if similarity is not None and not bool(torch.isfinite(similarity).all()):
        raise ValueError("similarity contains NaN or infinity")
    if scores is not None and not bool(((scores >= 0) & torch.isfinite(scores)).all()):
        raise ValueError(
            "scores contains NaN, infinity or a value below 0; "
            "give softmax or sigmoid of the logits, not the logits"
        )
    if expert_loss is not None and not bool(
        ((expert_loss >= 0) & torch.isfinite(expert_loss)).all()
    ):
        raise ValueError("expert_loss contains NaN, infinity or a value below 0")
