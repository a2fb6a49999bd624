"""Random inputs of ``reroute_`` and the check of an implementation against the oracle.

Shared by the tests here and under ``tests/gpu``; needs torch only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from sere_sglang.ops import COUNTER_FIELDS, LayerTable, encode_control, reroute_
from tests.ops import oracle


@dataclass(frozen=True)
class Spec:
    """What to generate. The generator adds what tests need often: ties, holes, exact equality."""

    seed: int = 0
    num_tokens: int = 8
    num_experts: int = 16
    top_k: int = 4
    num_valid: int = -1
    classes: tuple[tuple[int, float], ...] = ((2, 0.0),)
    enabled: bool = True
    row_classes: bool = False  # a class per row, at times one beyond the block's
    ranked: bool = False  # no weights: slots are already ranked
    weight_levels: int = 0  # weights take so few values that they tie; 0: all differ
    similarity_levels: int = 0
    symmetric: bool = True
    negative: bool = False  # similarities in [-1, 1], as a cosine would give
    holes: float = 0.0  # share of -1 ids
    foreign: float = 0.0  # share of ids below -1 or beyond E: not experts, left alone; no padding
    hot: float = 1.0  # share of the experts that tokens choose from
    scale: bool = False
    neighbors: bool = True  # hand over the table's sorted rows
    extra_columns: int = 0  # fused shared-expert slots behind the routed ones
    rho_of_matrix: bool = False  # replace each rho > 0 by an entry of the matrix


@dataclass
class Case:
    spec: Spec
    ids: torch.Tensor  # int32 [T, K]
    weights: torch.Tensor | None  # float32 [T, K]
    similarity: torch.Tensor  # float32 [E, E]
    scale: torch.Tensor | None
    row_class: torch.Tensor | None  # uint8 [>= T]
    classes: tuple[tuple[int, float], ...] = field(default_factory=tuple)


def make_case(spec: Spec) -> Case:
    generator = torch.Generator().manual_seed(spec.seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    tokens, experts, top_k = spec.num_tokens, spec.num_experts, spec.top_k
    similarity = uniform(experts, experts)
    if spec.similarity_levels:
        similarity = (similarity * spec.similarity_levels).floor() / spec.similarity_levels
    if spec.symmetric:
        similarity = similarity.triu() + similarity.triu(1).T
    if spec.negative:
        similarity = similarity * 2 - 1
    similarity.fill_diagonal_(1.0)

    choices = min(experts, max(top_k, round(experts * spec.hot)))
    ids = uniform(tokens, choices).argsort(dim=1)[:, :top_k].to(torch.int32)
    if spec.holes:
        ids[uniform(tokens, top_k) < spec.holes] = -1
    if spec.foreign:
        strangers = torch.where(uniform(tokens, top_k) < 0.5, experts + ids, -2 - ids)
        ids = torch.where(uniform(tokens, top_k) < spec.foreign, strangers, ids)

    weights = uniform(tokens, top_k)
    if spec.weight_levels:
        weights = (weights * spec.weight_levels).floor() / spec.weight_levels

    classes = spec.classes
    if spec.rho_of_matrix:
        picks = similarity.flatten()[
            torch.randint(experts * experts, (len(classes),), generator=generator)
        ].tolist()
        classes = tuple(
            (s, abs(pick) if rho > 0 else rho)
            for (s, rho), pick in zip(classes, picks, strict=True)
        )
    row_class = None
    if spec.row_classes:
        row_class = torch.randint(0, len(classes) + 1, (tokens + 3,), generator=generator)
        row_class = row_class.to(torch.uint8)
    return Case(
        spec=spec,
        ids=ids,
        weights=None if spec.ranked else weights,
        similarity=similarity,
        scale=0.5 + uniform(experts, experts) if spec.scale else None,
        row_class=row_class,
        classes=classes,
    )


def random_spec(rng: random.Random, max_tokens: int = 512, max_experts: int = 512) -> Spec:
    """A spec from a plain random generator, for machines without hypothesis."""
    top_k = rng.randint(1, 16)
    num_experts = rng.randint(top_k, max_experts)
    num_tokens = rng.choice([0, 1, 2, rng.randint(0, 40), rng.randint(0, max_tokens)])
    return Spec(
        seed=rng.getrandbits(32),
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=top_k,
        num_valid=rng.choice([-1, -1, 0, rng.randint(0, num_tokens), num_tokens + 3]),
        classes=tuple(
            (rng.choice([1, 2, 3, top_k, rng.randint(-1, top_k + 1)]), rng.choice([0.0, 0.5, 0.9]))
            for _ in range(rng.choice([1, 1, 2, 4]))
        ),
        enabled=rng.random() < 0.9,
        row_classes=rng.random() < 0.6,
        ranked=rng.random() < 0.3,
        weight_levels=rng.choice([0, 0, 2, 5]),
        similarity_levels=rng.choice([0, 0, 2, 8]),
        symmetric=rng.random() < 0.7,
        negative=rng.random() < 0.2,
        holes=rng.choice([0.0, 0.0, 0.1, 0.7, 1.0]),
        hot=rng.choice([1.0, 0.5, 0.1]),
        scale=rng.random() < 0.4,
        neighbors=rng.random() < 0.7,
        extra_columns=rng.choice([0, 0, 1, 2]),
        rho_of_matrix=rng.random() < 0.5,
    )


def expected(case: Case, distinct: bool | None = None) -> oracle.Outcome:
    """distinct: by default what `reroute_` does by default, wherever there are weights."""
    return oracle.reroute(
        case.ids.tolist(),
        None if case.weights is None else case.weights.tolist(),
        case.similarity.tolist(),
        enabled=case.spec.enabled,
        num_valid=case.spec.num_valid,
        classes=case.classes,
        row_class=None if case.row_class is None else case.row_class.tolist(),
        scale=None if case.scale is None else case.scale.tolist(),
        distinct=case.weights is not None if distinct is None else distinct,
    )


def check(case: Case, impl: str, device: str = "cpu", distinct: bool | None = None) -> None:
    """Run one implementation and compare ids, weights, counters and what must stay untouched.

    distinct: None for both, with distinct rows and without; without weights there is one only.
    """
    forms = (False, True) if distinct is None else (distinct,)
    for form in (False,) if case.weights is None else forms:
        _check(case, impl, device, form)


def _check(case: Case, impl: str, device: str, distinct: bool) -> None:
    spec = case.spec
    want = expected(case, distinct)
    wide_ids, ids = _with_extra_columns(case.ids, spec.extra_columns, device)
    wide_weights = weights = None
    if case.weights is not None:
        wide_weights, weights = _with_extra_columns(case.weights, spec.extra_columns, device)
    table = LayerTable.build(case.similarity, case.scale, device=device)
    if not spec.neighbors:
        table = LayerTable(table.similarity, None, table.scale)
    control = encode_control(enabled=spec.enabled, num_valid=spec.num_valid, classes=case.classes)
    counters = torch.full((len(COUNTER_FIELDS),), 1000, dtype=torch.int64, device=device)

    reroute_(
        ids,
        weights,
        table,
        control.to(device),
        row_class=None if case.row_class is None else case.row_class.to(device),
        counters=counters,
        distinct=distinct,
        impl=impl,
    )

    assert ids.tolist() == want.ids
    if weights is not None:
        # Bit for bit: a float32 survives the way through Python's float unchanged.
        assert weights.tolist() == want.weights
    added = dict(zip(COUNTER_FIELDS, (counters - 1000).tolist(), strict=True))
    assert added == want.counters
    if spec.extra_columns:
        assert (wide_ids[:, spec.top_k :] == 7).all()
        assert wide_weights is None or (wide_weights[:, spec.top_k :] == 7).all()


def _with_extra_columns(
    values: torch.Tensor, extra: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.full(
        (values.shape[0], values.shape[1] + extra), 7, dtype=values.dtype, device=device
    )
    wide[:, : values.shape[1]] = values.to(device)
    return wide, wide[:, : values.shape[1]]
