"""A closed load of streaming completions, and the decode speed it saw."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

import aiohttp


@dataclass(frozen=True)
class LoadResult:
    """decode_tok_s: tokens per second while every stream was decoding; text: first stream."""

    decode_tok_s: float
    tokens: int
    text: str


def run_load(url: str, prompts: list[str], max_tokens: int) -> LoadResult:
    """Stream all `prompts` at once through ``/v1/completions``, greedy, and time the decoding.

    The window runs from the last stream's first token to the first stream's last one, so that
    prefill and the thinning tail are outside it.
    """
    return asyncio.run(_run(url, prompts, max_tokens))


async def _run(url: str, prompts: list[str], max_tokens: int) -> LoadResult:
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        streams = await asyncio.gather(
            *(_stream(session, url, prompt, max_tokens) for prompt in prompts)
        )
    for prompt, (times, _) in zip(prompts, streams, strict=True):
        if len(times) < 2:
            raise RuntimeError(f"a stream ended after {len(times)} chunk(s): {prompt[:60]!r}")
    start = max(times[0] for times, _ in streams)
    end = min(times[-1] for times, _ in streams)
    inside = sum(start < t <= end for times, _ in streams for t in times)
    return LoadResult(
        decode_tok_s=inside / (end - start),
        tokens=sum(len(times) for times, _ in streams),
        text=streams[0][1],
    )


async def _stream(
    session: aiohttp.ClientSession, url: str, prompt: str, max_tokens: int
) -> tuple[list[float], str]:
    body = {
        "model": "default",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    times: list[float] = []
    text: list[str] = []
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            # One chunk is one decode step here (stream_interval 1); its text may be empty
            # while a multi-byte character is incomplete.
            choices = json.loads(line[6:])["choices"]
            if choices:
                times.append(time.perf_counter())
                text.append(choices[0]["text"])
    return times, "".join(text)
