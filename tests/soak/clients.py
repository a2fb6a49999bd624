"""Streaming clients of random length that check what they get, and some that leave early."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from sere_sglang.measure.load import events

WORDS = ("river", "stone", "moon", "walks", "sings", "over", "under", "light", "quiet", "machine")
LONGEST = 96  # tokens of an answer
QUALITIES = (None, None, "exact", "balanced", "fast")
REFUSED = ({"SERE": "exact"}, ["exact"], {"sere": "best"})
"""Wishes that must get status 400; one request in `_REFUSED_ONE_IN` has one."""

_REFUSED_ONE_IN = 40


@dataclass
class Tally:
    """What became of all requests. wrong: what must not be, in words. wishes: whether they have
    any, which a server without SERE would not read."""

    complete: int = 0
    aborted: int = 0
    refused: int = 0
    tokens: int = 0
    slowest_s: float = 0.0
    wrong: list[str] = field(default_factory=list)
    wishes: bool = True


async def client(
    session: aiohttp.ClientSession, url: str, number: int, until: float, tally: Tally, seed: int
) -> None:
    """Asks again and again until `until` (monotonic seconds)."""
    draw = random.Random(f"{seed}/{number}")
    count = 0
    while time.monotonic() < until:
        count += 1
        rid = f"soak-{number}-{count}"
        try:
            async with asyncio.timeout(600):
                await _one(session, url, rid, draw, tally)
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            tally.wrong.append(f"{rid}: {type(error).__name__}: {error}"[:300])
        await asyncio.sleep(draw.expovariate(20))


async def _one(
    session: aiohttp.ClientSession, url: str, rid: str, draw: random.Random, tally: Tally
) -> None:
    length = min(LONGEST, 1 + int(draw.expovariate(1 / 24)))
    sampling: dict[str, Any] = {"max_new_tokens": length, "ignore_eos": True,
                                "temperature": draw.choice((0.0, 0.8))}  # fmt: skip
    must_be_refused = tally.wishes and draw.randrange(_REFUSED_ONE_IN) == 0
    wish = draw.choice(REFUSED) if must_be_refused else draw.choice(QUALITIES)
    if wish is not None and tally.wishes:
        sampling["custom_params"] = wish if must_be_refused else {"sere": wish}
    prompt = " ".join(draw.choices(WORDS, k=draw.randint(1, 60)))
    stream = not must_be_refused
    body = {"text": prompt, "rid": rid, "stream": stream, "sampling_params": sampling}
    leaves_after = draw.randint(0, length) if draw.random() < 0.25 else None
    start = time.monotonic()
    async with session.post(url + "/generate", json=body) as answer:
        if must_be_refused:
            if answer.status != 400:
                tally.wrong.append(f"{rid}: status {answer.status} for {wish}")
            tally.refused += 1
            return
        if answer.status != 200:
            tally.wrong.append(f"{rid}: status {answer.status}: {(await answer.text())[:200]}")
            return
        seen, text, finish = 0, "", None
        async for event in events(answer):
            chunk = json.loads(event)
            meta = chunk["meta_info"]
            if meta["id"] != rid:
                tally.wrong.append(f"{rid}: got a part of {meta['id']}")
            if meta["completion_tokens"] < seen or not _goes_on(text, chunk["text"]):
                tally.wrong.append(f"{rid}: out of order at {seen} tokens")
            seen, text, finish = meta["completion_tokens"], chunk["text"], meta["finish_reason"]
            if leaves_after is not None and seen >= leaves_after and finish is None:
                tally.aborted += 1
                tally.tokens += seen
                answer.close()  # as a user who leaves; the server is to notice
                return
    if finish is None or finish["type"] != "length" or seen != length:
        tally.wrong.append(f"{rid}: ended by {finish} after {seen} of {length} tokens")
    tally.complete += 1
    tally.tokens += seen
    tally.slowest_s = max(tally.slowest_s, time.monotonic() - start)


def _goes_on(before: str, now: str) -> bool:
    """Text is cumulative; its last character may have waited for more bytes."""
    return now.startswith(before.rstrip("\ufffd"))
