"""What a profile says about its model, in numbers: per layer, per measure, against another."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sere_sglang.profile.file import ProfileError, SereProfile

BATCH_SIZES = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class LayerReport:
    """Similarities of pairs of different experts; `best` is an expert's most similar other one.
    A layer of one expert has neither: they are nan.

    critical, replaceable: expert ids with the lowest and the highest best similarity.
    balance: perplexity of the popularity divided by E, 1 when all experts are used alike; None
    when the profile holds no popularity.
    """

    layer: int
    mean: float
    deviation: float
    lowest: float
    median: float
    highest: float
    mean_best: float
    lowest_best: float
    critical: list[int]
    replaceable: list[int]
    balance: float | None
    unused: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measures_of(profile: SereProfile) -> list[str]:
    """The leading measure, then those kept as tables ``similarity_<measure>``."""
    layers = [set(profile.tables.get(layer, ())) for layer in profile.similarity]
    tables = set.intersection(*layers)  # a measure of some layers only is of no use
    others = [n.split("_", 1)[1].replace("_", "-") for n in tables if n.startswith("similarity_")]
    return [profile.metadata.method or "similarity", *sorted(others)]


def matrices_of(profile: SereProfile, measure: str | None = None) -> dict[int, torch.Tensor]:
    """layer -> float32 [E, E]. Raises `ProfileError` for a measure that the profile lacks."""
    available = measures_of(profile)
    if measure is None or measure == available[0]:
        return profile.similarity
    name = f"similarity_{measure.replace('-', '_')}"
    if measure not in available:
        raise ProfileError(
            f"--measure {measure}: this profile holds {', '.join(available)}; calibrate with "
            f"--measure {measure}"
        )
    return {layer: tables[name].float() for layer, tables in profile.tables.items()}


def layer_reports(profile: SereProfile, measure: str | None = None) -> list[LayerReport]:
    reports = []
    for layer, matrix in matrices_of(profile, measure).items():
        pairs = _or_nan(upper(matrix))
        best = best_similarity(matrix)[: 0 if len(matrix) < 2 else None]
        popularity = profile.tables.get(layer, {}).get("popularity")
        reports.append(
            LayerReport(
                layer=layer,
                mean=pairs.mean().item(),
                deviation=pairs.std(correction=0).item(),
                lowest=pairs.min().item(),
                median=pairs.median().item(),
                highest=pairs.max().item(),
                mean_best=_or_nan(best).mean().item(),
                lowest_best=_or_nan(best).min().item(),
                critical=best.argsort(stable=True)[:3].tolist(),
                replaceable=best.argsort(descending=True, stable=True)[:3].tolist(),
                balance=None if popularity is None else balance(popularity),
                unused=None if popularity is None else int((popularity == 0).sum()),
            )
        )
    return reports


def upper(matrix: torch.Tensor) -> torch.Tensor:
    """The entries above the diagonal, float64 [E (E - 1) / 2]."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return matrix[rows, columns].to(torch.float64)


def best_similarity(matrix: torch.Tensor) -> torch.Tensor:
    """[E]: similarity of each expert's best substitute."""
    return _without_self(matrix).max(1).values


def best_substitute(matrix: torch.Tensor) -> torch.Tensor:
    """int64 [E]: each expert's most similar other expert, the lowest id on a tie."""
    return _without_self(matrix).argmax(1)


def balance(popularity: torch.Tensor) -> float:
    share = popularity.to(torch.float64) / max(1, int(popularity.sum()))
    entropy = -torch.special.xlogy(share, share).sum()
    return (entropy.exp() / len(popularity)).item()


def expected_active(by_rank: torch.Tensor, num_tokens: int, primary_k: int, batch: int) -> float:
    """Expected number of experts that a batch activates when only ranks < `primary_k` choose.

    by_rank: int [K, E] counts over `num_tokens` tokens. With primary_k = K it is what plain
    routing activates; below, what re-routing with threshold 0 leaves. Tokens are taken as
    independent, so batches of similar tokens activate fewer.
    """
    chance = by_rank[:primary_k].sum(0).to(torch.float64) / num_tokens
    return (1 - (1 - chance).clamp(0, 1) ** batch).sum().item()


def expected_active_table(profile: SereProfile) -> list[dict[str, float]]:
    """One row per S (the last is plain routing): S and the mean over layers for `BATCH_SIZES`."""
    ranks = [t["popularity_by_rank"] for t in profile.tables.values() if "popularity_by_rank" in t]
    tokens = profile.metadata.num_tokens
    if not ranks or not tokens:
        return []
    rows = []
    for s in range(1, ranks[0].shape[0] + 1):
        row: dict[str, float] = {"primary_k": s}
        for batch in BATCH_SIZES:
            active = [expected_active(by_rank, tokens, s, batch) for by_rank in ranks]
            row[str(batch)] = sum(active) / len(active)
        rows.append(row)
    return rows


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's correlation of the pairs of two matrices; nan when one is constant, or has fewer
    than two."""
    if len(a) < 3:
        return math.nan
    from scipy.stats import ConstantInputWarning, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(upper(a), upper(b)).statistic)


def compare(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> list[dict[str, float]]:
    """Per layer that both hold: rank correlation, and how often the best substitute differs."""
    rows = []
    for layer in sorted(a.keys() & b.keys()):
        if a[layer].shape != b[layer].shape:
            raise ProfileError(
                f"layer {layer} has {len(a[layer])} experts in one profile and {len(b[layer])} in "
                "the other; compare profiles of the same model"
            )
        differ = (best_substitute(a[layer]) != best_substitute(b[layer])).double().mean().item()
        rows.append(
            {
                "layer": layer,
                "rank_correlation": rank_correlation(a[layer], b[layer]),
                "best_substitute_differs": differ,
                "largest_difference": (a[layer] - b[layer]).abs().max().item(),
            }
        )
    if not rows:
        raise ProfileError("the two profiles have no layer in common; compare the same model")
    return rows


def _or_nan(values: torch.Tensor) -> torch.Tensor:
    return values if len(values) else torch.full((1,), math.nan)


def _without_self(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.clone().fill_diagonal_(-1)
