"""Questions answered over HTTP, so many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from sere_sglang.measure.questions import Question
from sere_sglang.measure.server import Server


def answers(
    server: Server,
    questions: Sequence[Question],
    *,
    tokenizer: Any,
    at_once: int,
    max_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> list[str]:
    """What the server writes, greedy, to each question; `at_once` of them decode together."""
    prompts = [_prompt(question, tokenizer) for question in questions]
    return asyncio.run(_ask(server, questions, prompts, at_once, max_tokens, advance))


def _prompt(question: Question, tokenizer: Any) -> str:
    if question.raw:
        return question.prompt
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": question.prompt}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return f"Question: {question.prompt}\nAnswer:"


async def _ask(
    server: Server,
    questions: Sequence[Question],
    prompts: Sequence[str],
    at_once: int,
    max_tokens: int,
    advance: Callable[[], None],
) -> list[str]:
    room = asyncio.Semaphore(at_once)

    async def ask(session: aiohttp.ClientSession, question: Question, prompt: str) -> str:
        sampling = {"temperature": 0, "max_new_tokens": max_tokens, "stop": list(question.stops)}
        async with room:
            body = {"text": prompt, "sampling_params": sampling}
            async with session.post(f"{server.url}/generate", json=body) as answer:
                answer.raise_for_status()
                text = (await answer.json())["text"]
            advance()
            return text

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, headers=server.headers) as session:
        asked = (ask(session, q, p) for q, p in zip(questions, prompts, strict=True))
        return list(await asyncio.gather(*asked))
