"""Quality at the batch composition that was timed: teacher-forced decoding of held-out text.

SGLang's own custom logit processor sees each decode step's full next-token logits. Ours keeps
them and then forces the held-out token, so that two servers walk through the same text in the
same batch and their distributions can be compared step by step. What it keeps goes through files,
so the server has to run on this machine.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from sere_sglang.errors import SereError
from sere_sglang.measure.server import Server
from sere_sglang.measure.texts import Text

SERVER_FLAG = "--enable-custom-logit-processor"


class TeacherForcing(CustomLogitProcessor):
    """Appends each step's log-probabilities (float32 [vocab]) to a file, then forces a token."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        log_probs: np.ndarray | None = None
        for row, params in enumerate(custom_param_list or []):
            step = params.setdefault("step", 0)
            params["step"] = step + 1
            if step >= len(params["forced"]):
                continue
            if step == 0:
                params["writes"] = _claim(params["record"])
            if params["writes"]:
                if log_probs is None:  # before the first row is overwritten
                    log_probs = logits.float().log_softmax(-1).cpu().numpy()
                params["writes"] = _append(params["record"], log_probs[row].tobytes())
            logits[row] = float("-inf")
            logits[row, params["forced"][step]] = 0.0
        return logits


def _append(record: str, log_probs: bytes) -> bool:
    """Whether it could. A record is whole or not there: a full disk must not stop the server."""
    try:
        with open(record, "ab") as file:
            file.write(log_probs)
    except OSError:
        Path(record).unlink(missing_ok=True)
        return False
    return True


def _claim(record: str) -> bool:
    """Whether this process is the one of a server's ranks, which all sample, that writes."""
    try:
        os.close(os.open(f"{record}.claimed", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError:
        return False
    return True


def forced_log_probs(
    server: Server, prompts: Sequence[list[int]], continuations: Sequence[list[int]]
) -> np.ndarray:
    """Log-probabilities [requests, steps, vocab] along `continuations`, all in one batch.

    Step 0 comes from the prefill, the others from decode steps of ``len(prompts)`` rows. Raises
    `SereError` when the server's files are not here.
    """
    steps = len(continuations[0])
    with tempfile.TemporaryDirectory() as folder:
        records = [Path(folder) / f"{i}.f32" for i in range(len(prompts))]
        server.post(
            "/generate",
            {
                "input_ids": list(prompts),
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
            timeout=3600,
        )
        if missing := [r for r in records if not r.exists()]:
            raise SereError(
                f"the server at {server.url} wrote no {missing[0]}: quality is measured through "
                "files, so run this command on the machine of the server, as a user whose files "
                f"it may write, with room for them in {tempfile.gettempdir()}"
            )
        rows = [np.fromfile(r, dtype=np.float32).reshape(steps, -1) for r in records]
    return np.stack(rows)


def forced_in_batches(server: Server, texts: Sequence[Text], batch: int) -> np.ndarray:
    """`forced_log_probs` of whole batches of `texts`, one after the other."""
    batches = []
    for first in range(0, len(texts), batch):
        chosen = texts[first : first + batch]
        prompts = [text.prompt_ids for text in chosen]
        batches.append(forced_log_probs(server, prompts, [t.continuation_ids for t in chosen]))
    return np.concatenate(batches)
