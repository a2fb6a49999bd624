"""What ``sere-sglang evaluate`` measures, cell by cell: an operating point at one batch size."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sere_sglang.cli.served import Served
from sere_sglang.measure.answers import answers
from sere_sglang.measure.cells import Cells
from sere_sglang.measure.divergence import Divergence, divergence
from sere_sglang.measure.forcing import forced_in_batches
from sere_sglang.measure.intervals import difference_interval, interval, share_interval
from sere_sglang.measure.questions import QuestionSet
from sere_sglang.measure.routing import OFF, Routing
from sere_sglang.measure.texts import Text, as_many
from sere_sglang.measure.turns import use
from sere_sglang.measure.weight import Weigher

_FORCED_ROWS = 4096  # sequences times steps whose whole distributions are kept at once
_PERCENTILE = 99
_RESAMPLES = 400  # of that, whose every draw sorts all steps


@dataclass(frozen=True)
class Grid:
    """points: without OFF, which is what they are compared with; about: what else a result hangs
    on, of the server and the text; sequences: of text, at least."""

    points: Sequence[Routing]
    batches: Sequence[int]
    about: dict[str, Any]
    sequences: int = 0
    max_tokens: int = 0

    def key(self, kind: str, batch: int, point: Routing) -> dict[str, Any]:
        """Of a cell; a result is taken up again under an equal one only."""
        asked = {"sequences": self.sequences, "max_tokens": self.max_tokens}
        settings = {"kind": kind, "batch": batch, "settings": point.settings}
        return {"point": point.name, **settings, **asked, **self.about}


def digest(content: Any) -> str:
    """Short, of anything that has a form in JSON or words."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]


def walk_texts(
    served: Served,
    grid: Grid,
    texts: list[Text],
    num_experts: int,
    cells: Cells,
    rows: list[dict[str, Any]],
    advance: Callable[[str], None],
) -> None:
    """Append rows of all points at all batch sizes, teacher-forced; what is in `cells` is taken
    from there."""
    weigher = Weigher(served.sere, num_experts)
    for batch in grid.batches:
        chosen = in_batches(texts, max(batch, grid.sequences), batch)
        exact = None
        for point in grid.points:
            key = grid.key("text", batch, point)
            row = cells.get(key)
            if row is None:
                if exact is None:
                    use(served.servers, OFF)
                    exact = forced_in_batches(served.sere, chosen, batch)
                row = text_row(served, point, chosen, batch, exact, weigher)
                cells.add(key, row)
            rows.append({"point": point.name, "batch": batch, **row})
            advance(f"batch {batch}, {point.name}")


def ask_questions(
    served: Served,
    grid: Grid,
    asked: QuestionSet,
    tokenizer: Any,
    cells: Cells,
    rows: list[dict[str, Any]],
    advance: Callable[[str], None],
) -> None:
    """Append rows of OFF and all points at all batch sizes, by generation; ``difference`` is to
    OFF on the same questions."""
    for batch in grid.batches:
        exact: list[float] = []
        for point in (OFF, *grid.points):
            key = grid.key("questions", batch, point)
            found = cells.get(key)
            if found is None:
                texts = answers(
                    use(served.servers, point), asked.questions, tokenizer=tokenizer,
                    at_once=batch, max_tokens=grid.max_tokens,
                )  # fmt: skip
                pairs = zip(asked.questions, texts, strict=True)
                scores = [question.score(text) for question, text in pairs]
                found = {"scores": scores, "answers": [digest(text) for text in texts]}
                cells.add(key, found)
            exact = exact or found["scores"]
            rows.append({"point": point.name, "batch": batch, **_score_row(found["scores"], exact)})
            advance(f"batch {batch}, {point.name}")


def in_batches(texts: list[Text], sequences: int, batch: int) -> list[Text]:
    """Whole batches of at least so many, shuffled, and cut so that their distributions fit in
    memory."""
    count = -(-sequences // batch) * batch
    steps = 1 + int(np.clip(_FORCED_ROWS // count, 8, 32))
    chosen = [text.cut(steps) for text in as_many(texts, count)]
    random.Random(0).shuffle(chosen)
    return chosen


def text_row(
    served: Served,
    point: Routing,
    texts: list[Text],
    batch: int,
    exact: np.ndarray,
    weigher: Weigher,
) -> dict[str, Any]:
    """One cell: `texts` walked at `point`, against `exact` (`forced_in_batches` with OFF)."""
    use(served.servers, point).set_sere(reset_counters=True)
    seen = forced_in_batches(served.sere, texts, batch)
    decode_steps = len(texts) // batch * (seen.shape[1] - 1)
    # What a policy left exact has loaded everything.
    rerouted = min(weigher.steps() / decode_steps, 1.0)
    shares = {name: 1 - rerouted * (1 - value) for name, value in weigher.shares().items()}
    found = divergence(exact, seen, [text.continuation_ids for text in texts])
    return {"rerouted_steps": rerouted, **shares, **_costs(found)}


def _costs(found: Divergence) -> dict[str, Any]:
    """Means with intervals by resampling sequences; nats per token."""
    costs: dict[str, Any] = {"sequences": len(found.kl), "steps": found.kl.shape[1]}
    for name, values in (
        ("kl", found.kl), ("delta_nll", found.delta_nll), ("top1_agreement", found.agrees),
    ):  # fmt: skip
        costs[name] = float(values.mean())
        costs[f"{name}_interval"] = list(interval(values.mean(1), np.mean))
    costs["kl_p99"] = float(np.percentile(found.kl, _PERCENTILE))

    def p99(drawn: np.ndarray, axis: int) -> np.ndarray:
        """Of the sequences whose numbers stand along the last axis."""
        return np.percentile(found.kl[drawn], _PERCENTILE, axis=(-2, -1))

    costs["kl_p99_interval"] = list(interval(np.arange(len(found.kl)), p99, resamples=_RESAMPLES))
    return costs


def _score_row(scores: list[float], exact: list[float]) -> dict[str, Any]:
    """Accuracy, and what it is more or less than exact routing's on the same questions."""
    differences = np.subtract(scores, exact)
    return {
        "questions": len(scores),
        "accuracy": float(np.mean(scores)),
        "accuracy_interval": list(share_interval(scores)),
        "difference": float(differences.mean()),
        "difference_interval": list(difference_interval(differences)),
        "exact_only": int((differences < 0).sum()),
        "sere_only": int((differences > 0).sum()),
    }
