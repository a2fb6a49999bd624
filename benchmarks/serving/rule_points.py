"""Operating points of every rule, each measured in teacher-forced batches of one size."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.serving.equal_bytes import Curve
from sere_sglang.measure import forcing
from sere_sglang.measure.divergence import divergence
from sere_sglang.measure.intervals import interval
from sere_sglang.measure.routing import static_settings
from sere_sglang.measure.texts import Text
from sere_sglang.measure.weight import Weigher

LOSSES = (0.4, 0.2, 0.1, 0.06, 0.035, 0.02, 0.012, 0.006, 0.003, 0.0015)
EXPERTS = (0.2, 0.3, 0.45, 0.6, 0.75, 0.9)  # of those that exact routing loads
SIMILARITY, SCALED = "similarity", "similarity, scaled"
ENERGY, AUTO = "energy", "energy, surrogates"
RULES = (SIMILARITY, "piggyback", "budget", ENERGY, AUTO)


def points(rule: str, plain: float, top_k: int) -> Iterator[dict[str, Any]]:
    """Live settings, from hard to mild. plain: experts that exact routing loads in a layer."""
    if rule in (SIMILARITY, SCALED, "piggyback"):
        for primary_k in range(1, top_k):
            yield static_settings(primary_k) | {"rule": rule.split(",")[0]}
    elif rule == "budget":
        for share in EXPERTS:
            most = max(1, round(share * plain))
            yield static_settings(1) | {"rule": "budget", "max_experts": most}
    else:
        for loss in LOSSES:
            about = {"quality_budget": loss, "surrogates": rule == AUTO}
            yield static_settings(1) | {"rule": "energy"} | about


class ForcedBatches:
    """Held-out texts in batches of `batch`, walked through exactly once, then at any point.

    Attributes:
        plain: experts that exact routing loads in a layer, in the mean.
    """

    def __init__(self, weigh: Weigher, texts: Sequence[Text], batch: int, seed: int) -> None:
        """seed: of the way in which texts are put together; every one is in at least once."""
        self._batch, self._texts = batch, len(texts)
        own = list(range(len(texts)))
        random.Random(seed).shuffle(own)
        self._own = own + own[: -len(own) % batch]
        self._chosen = [texts[i] for i in self._own]
        weigh.counts_exactly()
        self._exact = forcing.forced_in_batches(weigh.server, self._chosen, batch)
        self.plain = weigh.active() / weigh.layers

    def measured(self, weigh: Weigher, rule: str) -> Iterator[dict[str, Any]]:
        """A row for each of the rule's points; ``_kl`` is that of each text, ``[texts]``.

        weigh: of that server, or another one of this model.
        """
        server = weigh.server
        for settings in points(rule, self.plain, weigh.top_k):
            server.set_sere(**settings, reset_counters=True)
            seen = forcing.forced_in_batches(server, self._chosen, self._batch)
            kl, costs = self._costs(seen)
            by_text = np.zeros(self._texts)
            by_text[self._own] = kl
            point = server.sere()["operating_point"]
            yield {"rule": rule, "point": point, **weigh.shares(), **costs, "_kl": by_text}

    def _costs(self, seen: np.ndarray) -> tuple[np.ndarray, dict[str, float | list[float]]]:
        """Over all sequences and decode steps, in nats per token; KL also by sequence."""
        found = divergence(self._exact, seen, [text.continuation_ids for text in self._chosen])
        by_sequence = found.kl.mean(1)
        return by_sequence, {
            "kl": float(found.kl.mean()),
            "kl_ci": list(interval(by_sequence, np.mean)),
            "kl_p99": float(np.percentile(found.kl, 99)),
            "delta_nll": float(found.delta_nll.mean()),
            "top1_agreement": float(found.agrees.mean()),
        }


def curve(rows: Sequence[dict[str, Any]]) -> Curve:
    """Of one rule at one batch size; a point is the mean over all rows of its name."""
    by_point: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_point.setdefault(row["point"]["name"], []).append(row)
    return Curve(
        np.array([np.mean([row["bytes_share"] for row in own]) for own in by_point.values()]),
        np.array([np.mean([row["_kl"] for row in own], axis=0) for own in by_point.values()]),
    )
