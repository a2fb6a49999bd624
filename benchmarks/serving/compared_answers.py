"""A server's greedy answers held against plain SGLang's, and why one did not serve."""

from __future__ import annotations

from typing import Any

from sere_sglang.measure.server import NotServing


def first_difference(wanted: list[Any], got: list[Any], tie: float) -> str:
    """The first token that differs where plain SGLang's two best are no tie; empty if none does.

    wanted, got: answers of ``/generate`` with ``return_logprob`` and two ``top_logprobs_num``, the
    first plain SGLang's. tie: nats between the two best tokens below which either may come.
    """
    if len(wanted) != len(got):
        return f"{len(got)} answers where it gives {len(wanted)}"
    for number, (want, have) in enumerate(zip(wanted, got, strict=True)):
        ids = [
            [entry[1] for entry in a["meta_info"]["output_token_logprobs"]] for a in (want, have)
        ]
        tops = want["meta_info"]["output_top_logprobs"]
        for place, (a, b) in enumerate(zip(*ids, strict=False)):
            if a == b:
                continue
            best = sorted((entry[0] for entry in tops[place] if entry[0] is not None), reverse=True)
            if len(best) > 1 and best[0] - best[1] < tie:
                break
            return f"token {place} of answer {number} is {b}, not {a}"
    return ""


def last_words(error: Exception) -> str:
    """The exception in a server's log, or what the error says of a log that is gone."""
    if isinstance(error, NotServing):
        kept = error.log.exists()
        text = error.log.read_text(errors="replace") if kept else str(error)
        lines = [x.strip() for x in text.splitlines() if x.strip()]
        errors = [x for x in lines if x.split(":")[0].endswith(("Error", "Exception", "error"))]
        return (errors or lines or [error.what])[-1][:200]
    return f"{type(error).__name__}: {error}"[:200]
