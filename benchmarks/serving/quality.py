"""Quality at the batch composition that was timed: teacher-forced decoding of held-out text.

SGLang's own custom logit processor sees each decode step's full next-token logits. Ours keeps
them and then forces the held-out token, so that two servers walk through the same text in the
same batch and their distributions can be compared step by step.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from benchmarks.serving.server import Server

SERVER_FLAG = "--enable-custom-logit-processor"


class TeacherForcing(CustomLogitProcessor):
    """Appends each step's log-probabilities (float32 [vocab]) to a file, then forces a token."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        for row, params in enumerate(custom_param_list or []):
            step = params.setdefault("step", 0)
            params["step"] = step + 1
            if step >= len(params["forced"]):
                continue
            with open(params["record"], "ab") as record:
                record.write(logits[row].float().log_softmax(-1).cpu().numpy().tobytes())
            logits[row] = float("-inf")
            logits[row, params["forced"][step]] = 0.0
        return logits


def forced_log_probs(
    server: Server, prompts: list[list[int]], continuations: list[list[int]]
) -> np.ndarray:
    """Log-probabilities [requests, steps, vocab] along `continuations`, all in one batch.

    Step 0 comes from the prefill, the others from decode steps of ``len(prompts)`` rows.
    """
    steps = len(continuations[0])
    with tempfile.TemporaryDirectory() as folder:
        records = [Path(folder) / f"{i}.f32" for i in range(len(prompts))]
        server.post(
            "/generate",
            {
                "input_ids": prompts,
                "sampling_params": [
                    {
                        "temperature": 0,
                        "max_new_tokens": steps,
                        "ignore_eos": True,
                        "custom_params": {"forced": forced, "record": str(record)},
                    }
                    for forced, record in zip(continuations, records, strict=True)
                ],
                "custom_logit_processor": [TeacherForcing.to_str()] * len(prompts),
            },
        )
        rows = [np.fromfile(r, dtype=np.float32).reshape(steps, -1) for r in records]
    return np.stack(rows)


def forced_in_batches(server: Server, texts: list[dict[str, Any]], batch: int) -> np.ndarray:
    """`forced_log_probs` of whole batches of `heldout_prompts`, one after the other."""
    batches = []
    for first in range(0, len(texts), batch):
        prompts, forced = (
            [text[key] for text in texts[first : first + batch]]
            for key in ("prompt_ids", "continuation_ids")
        )
        batches.append(forced_log_probs(server, prompts, forced))
    return np.concatenate(batches)


def mean_kl(reference: np.ndarray, other: np.ndarray) -> float:
    """KL(reference || other) in nats, averaged over requests and decode steps (not step 0)."""
    p, q = (x[:, 1:].astype(np.float64) for x in (reference, other))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def perplexity(log_probs: np.ndarray, continuations: list[list[int]]) -> float:
    """Per-token perplexity of the held-out continuations over the decode steps."""
    tokens = np.asarray(continuations)[:, 1:, None]
    taken = np.take_along_axis(log_probs[:, 1:].astype(np.float64), tokens, axis=-1)
    return float(np.exp(-taken.mean()))
