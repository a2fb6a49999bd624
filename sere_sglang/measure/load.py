"""A closed load of streams, and the decode speed it saw."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import aiohttp

from sere_sglang.measure.server import Server

_COUNT = re.compile(rb'"completion_tokens":\s*(\d+)')
_INDEX = re.compile(rb'"index":\s*(\d+)\s*\}$')


@dataclass(frozen=True)
class LoadResult:
    """decode_tok_s: tokens per second while every stream was decoding; gaps_ms: between one token
    of a stream and the next, in that time; text: what the first stream wrote."""

    decode_tok_s: float
    tokens: int
    text: str
    gaps_ms: list[float] = field(repr=False)


class NoOverlap(RuntimeError):
    """At no time were all streams decoding: too few tokens for how far apart they started."""


def run_load(server: Server, prompts: Sequence[list[int]], max_tokens: int) -> LoadResult:
    """Stream all `prompts` (token ids) at once through ``/generate``, greedy; time the decoding.

    The window runs from the last stream's first token to the first stream's last one, so that
    prefill and the thinning tail are outside it. Raises `NoOverlap`.
    """
    return asyncio.run(_run(server, prompts, max_tokens))


async def _run(server: Server, prompts: Sequence[list[int]], max_tokens: int) -> LoadResult:
    arrived, text = await _streams(server, prompts, max_tokens)
    if any(not stream for stream in arrived):
        raise RuntimeError("a stream ended without a token: see the server's log")
    start = max(stream[0][0] for stream in arrived)
    end = min(stream[-1][0] for stream in arrived)
    inside, gaps = 0, []
    for stream in arrived:
        for (before, had), (at, has) in itertools.pairwise(stream):
            if start < at <= end and has > had:
                inside += has - had
                gaps += [1000 * (at - before) / (has - had)] * (has - had)
    if not inside:
        raise NoOverlap(f"{len(prompts)} streams of {max_tokens} tokens were never all decoding")
    return LoadResult(
        decode_tok_s=inside / (end - start),
        tokens=sum(stream[-1][1] for stream in arrived),
        text=text,
        gaps_ms=gaps,
    )


async def _streams(
    server: Server, prompts: Sequence[list[int]], max_tokens: int
) -> tuple[list[list[tuple[float, int]]], str]:
    """For each stream, when a piece came and how many tokens there were then; the first's text.

    One request carries them all. With a connection each, a busy machine starts some of them when
    others have ended, and hundreds keep this process busier than the server.
    """
    body = {
        "input_ids": list(prompts),
        "sampling_params": {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True},
        "stream": True,
    }
    arrived: list[list[tuple[float, int]]] = [[] for _ in prompts]
    first = b""
    async with (
        aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=1800), headers=server.headers, read_bufsize=1 << 20
        ) as session,
        session.post(f"{server.url}/generate", json=body) as answer,
    ):
        answer.raise_for_status()
        async for event in events(answer):
            # Under load SGLang puts several tokens in a piece. JSON is read of the last one only.
            count, index = tokens_so_far(event), _INDEX.search(event)
            if count is not None and index:
                arrived[int(index[1])].append((time.perf_counter(), count))
                first = event if index[1] == b"0" else first
    # Without a tokenizer a server answers with ids alone.
    return arrived, json.loads(first).get("text", "") if first else ""


def tokens_so_far(event: bytes) -> int | None:
    """Of the stream that a piece belongs to; None where it does not say."""
    count = _COUNT.search(event)
    return int(count[1]) if count else None


async def events(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The JSON of each piece of a streamed ``/generate``, which no `openai` client reads."""
    async for line in answer.content:
        if line.startswith(b"data:"):
            event = line.removeprefix(b"data:").strip()
            if event != b"[DONE]":
                yield event
