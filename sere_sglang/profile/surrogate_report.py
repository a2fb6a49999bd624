"""What a profile's surrogates explain of their experts, and what they weigh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sere_sglang.profile.file import SereProfile


@dataclass(frozen=True)
class SurrogateReport:
    """One layer. Shares are of the energy of an expert's output on held-out tokens routed to it,
    mean over the experts that had tokens.

    rank: of the stored surrogates, 0 where there are means alone. best_other: by the best multiple
    of another expert's output. mean: by the expert's mean. by_rank: by the best surrogate of at
    most that rank. stored: by what the profile holds. to_mean, to_nothing: experts that fell back.
    bytes: of all the layer's surrogates. share: the same as a share of its experts' weights.
    """

    layer: int
    rank: int
    best_other: float
    mean: float
    by_rank: dict[int, float]
    stored: float
    to_mean: int
    to_nothing: int
    bytes: int
    share: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """What calibration says of the layer."""
        fell = [f"{self.to_mean} to their mean"] if self.to_mean else []
        fell += [f"{self.to_nothing} to nothing"] if self.to_nothing else []
        back = f"; fell back: {', '.join(fell)}" if fell else "; no expert fell back"
        return (
            f"layer {self.layer}: surrogates of rank {self.rank} explain {self.stored:.2f} of an "
            f"expert held out (best other expert {self.best_other:.2f}, mean {self.mean:.2f}) "
            f"with {self.share:.1%} of its bytes{back}"
        )


def surrogate_reports(profile: SereProfile) -> list[SurrogateReport]:
    """Of every layer that has surrogates."""
    return [
        layer_report(layer, tables)
        for layer, tables in profile.tables.items()
        if "surrogate_bias" in tables
    ]


def layer_report(layer: int, tables: Mapping[str, torch.Tensor]) -> SurrogateReport:
    """tables: of a layer with surrogates, as in a profile."""
    out, bias = tables.get("surrogate_out"), tables["surrogate_bias"]
    experts, hidden = bias.shape
    rank = 0 if out is None else out.shape[1]
    linear = torch.zeros(experts, dtype=torch.bool) if out is None else out.any(2).any(1)
    constant = bias.any(1) & ~linear
    used = tables["expert_energy"] > 0
    shares = tables["surrogate_explained"].double()[:, used if used.any() else ~used].mean(1)
    best_other, mean, *by_rank, stored = shares.tolist()
    size = bias.element_size() * experts * hidden * (2 * rank + 1)
    return SurrogateReport(
        layer=layer,
        rank=rank,
        best_other=best_other,
        mean=mean,
        by_rank=dict(zip(tables["surrogate_ranks"].tolist(), by_rank, strict=True)),
        stored=stored,
        to_mean=int(constant.sum()),
        to_nothing=int((~linear & ~constant).sum()),
        bytes=size,
        share=size / int(tables["expert_bytes"].sum()),
    )
