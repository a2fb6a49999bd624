"""The demo model's held-out text, and two servers of one model: plain and with SERE."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sere_sglang.measure.server import Server, serve
from sere_sglang.measure.texts import CONTINUATION_TOKENS, PROMPT_TOKENS, Text, cut_texts

ROOT = Path(__file__).resolve().parents[2]
IMPORTS_CHECKOUT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
"""Environment of a server that is to be of this checkout."""

_CORES = sorted(os.sched_getaffinity(0))
TWO_RANKS = {
    # SGLang wants to be told which cores a rank may use when there is less than a NUMA node each.
    "SGLANG_CPU_OMP_THREADS_BIND": f"{_CORES[0]}|{_CORES[-1]}",
    # Found, NCCL is used by SGLang's CPU engine as well, and needs a GPU.
    "SGLANG_NCCL_SO_PATH": "/nonexistent",
}
"""Environment of a CPU engine with two ranks on one machine."""


def heldout_prompts(
    model: Path,
    prompt_tokens: int = PROMPT_TOKENS,
    continuation_tokens: int = CONTINUATION_TOKENS,
) -> list[Text]:
    """Of `model`'s ``data/heldout_prompts.jsonl``, cut to one length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    entries = map(json.loads, (model / "data" / "heldout_prompts.jsonl").read_text().splitlines())
    windows = (
        tokenizer(entry["prompt"] + entry["continuation"], add_special_tokens=False)["input_ids"]
        for entry in entries
    )
    texts = cut_texts(windows, tokenizer, prompt_tokens, continuation_tokens)
    if not texts:
        sys.exit(f"no held-out prompt of {prompt_tokens + continuation_tokens} tokens in {model}")
    return texts


@contextmanager
def both_servers(
    model: Path, profile: Path, logs: Path, *flags: str, told: Callable[[str], None]
) -> Iterator[dict[str, Server]]:
    """`{"plain": ..., "sere": ...}` serving `model`; logs go to `logs`/<name>.log."""
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, extra in (
            ("plain", []),
            ("sere", ["--moe-backend=sere", f"--sere-profile={profile}"]),
        ):
            log = logs / f"{name}.log"
            servers[name] = stack.enter_context(
                serve(model, log, *flags, *extra, env=IMPORTS_CHECKOUT)
            )
            told(f"[green]up[/] {name} server at {servers[name].url} (log: {log})")
        yield servers
