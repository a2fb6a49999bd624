"""Seam: ``TokenizerManager._create_tokenized_object``, ``_handle_batch_output``: ``--sere-shadow``.

A sampled request also gets its likeliest tokens from SGLang; its user did not ask and does not see
them. Once it has finished, a request of ours is prefilled with the same tokens: a prefill is exact,
whatever engine, graphs and ranks serve it. What both say is compared here, and the schedulers are
told (`schedule.shadow`).

Nothing of this may touch a user's request: what fails is counted, and said once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.errors import SereError
from sere_sglang.names import RowClass
from sere_sglang.patches.number_keys import flatten
from sere_sglang.patches.seam import hook, resolve
from sere_sglang.schedule.request_quality import KEY, QualityRules
from sere_sglang.schedule.shadow import TOP, ShadowWindow, divergence_at_least

logger = logging.getLogger(__name__)

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_IO = "sglang.srt.managers.io_struct"
_OURS = "sere-shadow-"  # what the ids of our own requests start with
_MOST_TOKENS = 512  # of a request's output that are compared
_MOST_FOLLOWED, _MOST_WAITING = 256, 64  # requests in flight, and finished ones
_PATIENCE_S, _LOOK_S, _TIMEOUT_S = 10.0, 0.05, 120.0

_NEUTRAL = {
    "n": (1,), "beam_width": (None, 1), "frequency_penalty": (0.0,), "presence_penalty": (0.0,),
    "repetition_penalty": (1.0,), "min_new_tokens": (0,), "json_schema": (None,), "regex": (None,),
    "ebnf": (None,), "structural_tag": (None,), "logit_bias": (None,), "watermark": (None,),
}  # fmt: skip
"""Sampling parameters that change the distribution, unlike temperature, or the form of the answer
-> what they are in a request that can be compared."""
_PLAIN = (
    "mm_inputs", "input_embeds", "positional_embed_overrides", "session_id", "session_params",
    "custom_logit_processor", "token_type_ids", "bootstrap_room", "return_logprob",
    "return_sampling_mask", "return_hidden_states", "return_routed_experts",
)  # fmt: skip
"""Fields of a tokenized request that are unset in one that can be compared."""

_shadow: Shadow | None = None


@dataclass
class _Followed:
    """A sampled request: what a second run needs, and what the first one said, step by step."""

    prompt: list[int]
    temperature: float
    under: int  # the settings that it began under
    same: dict[str, Any]  # of what it asked: adapter, cache
    room: int  # for tokens that are compared
    tokens: list[int] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    log_probs: list[list[float]] = field(default_factory=list)


def require_supported(flags: Any) -> None:
    """Raise `SereError`, naming flag and reason. flags: SGLang's, resolved."""
    reasons = {
        "--speculative-algorithm": (
            flags.speculative_algorithm is not None,
            "not every draft worker returns log-probabilities",
        ),
        "--disaggregation-mode": (
            flags.disaggregation_mode != "null",
            "a server that decodes does not prefill",
        ),
        "--tokenizer-worker-num": (
            flags.tokenizer_worker_num > 1,
            "requests do not pass the process that would compare them",
        ),
    }
    for flag, (is_set, reason) in reasons.items():
        if is_set:
            raise SereError(f"--sere-shadow: with {flag} {reason}; drop one of the two")


def start(manager: Any, rate: float, rules: QualityRules) -> None:
    """In the launcher, once its server is known to run SERE. Without a rate SGLang is left as it
    is until `follow` brings one."""
    global _shadow
    _shadow = Shadow(manager, rules)
    _set_rate(_shadow, rate)


async def follow(changes: dict[str, Any]) -> None:
    """After live settings have changed: what was compared before does not count for them."""
    if _shadow is None or changes.keys() <= {"reset_counters"}:
        return
    _set_rate(_shadow, changes.get("shadow", _shadow.rate))
    if _shadow.installed:
        await _shadow.settings_changed()


def _set_rate(shadow: Shadow, rate: float) -> None:
    shadow.rate = rate
    if rate and not shadow.installed:
        hook(f"{_MANAGER}._create_tokenized_object", _sample, HookType.AFTER, needs=["obj"])
        hook(f"{_MANAGER}._handle_batch_output", _collect, HookType.BEFORE, needs=["recv_obj"])
        shadow.installed = True


def _sample(tokenized: Any, _manager: Any, obj: Any, *_args: Any, **_kwargs: Any) -> None:
    if _shadow is not None and _shadow.rate:
        _shadow.sample(tokenized, obj)


def _collect(_manager: Any, recv_obj: Any) -> None:
    if _shadow is not None and _shadow.following:
        _shadow.collect(recv_obj)


class Shadow:
    """In the HTTP process. rate: share of requests; following: those in flight, by id."""

    def __init__(self, manager: Any, rules: QualityRules) -> None:
        self.manager = manager
        self.rate = 0.0
        self.installed = False
        self.following: dict[str, _Followed] = {}
        self._rules = rules
        self._random = random.Random()
        self._waiting: deque[_Followed] = deque()
        self._window = ShadowWindow()
        self._counts = {"tokens": 0, "requests": 0, "failed": 0, "dropped": 0}
        self._under = 0
        self._worker: asyncio.Task[None] | None = None
        self._warned = False

    async def settings_changed(self) -> None:
        """Requests that began under other settings are compared no more."""
        self._under += 1
        self._window.clear()
        self._waiting.clear()
        await self._report()

    def sample(self, tokenized: Any, obj: Any) -> None:
        """Follow this request, or not."""
        if self._random.random() >= self.rate or not self._comparable(tokenized):
            return
        while len(self.following) >= _MOST_FOLLOWED:  # ended without a word: aborted
            del self.following[next(iter(self.following))]
        tokenized.return_logprob, tokenized.logprob_start_len = True, -1
        tokenized.top_logprobs_num = TOP
        same = {name: getattr(obj, name) for name in ("lora_path", "extra_key", "cache_salt")}
        longest = self.manager.max_req_input_len - 1  # which the scheduler takes as an input
        self.following[tokenized.rid] = _Followed(
            list(tokenized.input_ids), float(tokenized.sampling_params.temperature), self._under,
            {name: value for name, value in same.items() if value is not None},
            max(0, min(_MOST_TOKENS, longest - len(tokenized.input_ids))),
        )  # fmt: skip

    def _comparable(self, tokenized: Any) -> bool:
        sampling = tokenized.sampling_params
        if not hasattr(tokenized, "return_logprob") or not isinstance(tokenized.rid, str):
            return False  # an embedding
        if tokenized.rid.startswith(_OURS) or not tokenized.input_ids:
            return False
        custom = sampling.custom_params or {}
        limit = sampling.max_new_tokens
        return (
            self._rules.class_of(custom) is not RowClass.EXACT
            and custom.keys() <= {KEY}
            and (limit is None or limit > 1)
            and not any(getattr(tokenized, name) for name in _PLAIN)
            and all(getattr(sampling, name) in neutral for name, neutral in _NEUTRAL.items())
        )

    def collect(self, received: Any) -> None:
        """What the schedulers said of requests in flight."""
        for i, rid in enumerate(received.rids):
            one = self.following.get(rid)
            if one is None:
                continue
            if received.output_top_logprobs_val and received.output_top_logprobs_val[i]:
                room = one.room - len(one.tokens)
                one.tokens += list(received.output_token_logprobs_idx[i])[:room]
                one.ids += list(received.output_top_logprobs_idx[i])[:room]
                one.log_probs += list(received.output_top_logprobs_val[i])[:room]
            reason = received.finished_reasons[i]
            if reason is not None:
                del self.following[rid]
                if reason.get("type") != "abort" and len(one.tokens) > 1:
                    self._queue(one)

    def _queue(self, one: _Followed) -> None:
        if one.under != self._under:
            return
        if len(self._waiting) >= _MOST_WAITING:
            self._waiting.popleft()
            self._counts["dropped"] += 1
        self._waiting.append(one)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        """Until nothing waits. One request at a time."""
        while self._waiting:
            await self._idle()
            if not self._waiting:
                return
            one = self._waiting.popleft()
            try:
                divergence = await asyncio.wait_for(self._compare(one), _TIMEOUT_S)
                self._counts["requests"] += 1
                self._counts["tokens"] += len(divergence)
                if one.under == self._under:
                    self._window.add(divergence)
            except Exception as error:
                self._failed(error)
            await self._report()

    def _failed(self, error: Exception) -> None:
        self._counts["failed"] += 1
        if not self._warned:
            self._warned = True
            logger.warning(
                "--sere-shadow: a request could not be scored again, which its user does not "
                "notice; further ones are only counted",
                exc_info=error,
            )

    async def _idle(self) -> None:
        """Returns when no request runs, or when waiting for that has taken long enough."""
        deadline = time.monotonic() + _PATIENCE_S
        while self.manager.rid_to_state and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)

    async def _compare(self, one: _Followed) -> np.ndarray:
        """Divergence at every decode step; the first token is of a prefill, and left out."""
        request = resolve(f"{_IO}.GenerateReqInput")(
            rid=_OURS + uuid.uuid4().hex,
            input_ids=one.prompt + one.tokens,
            sampling_params={"max_new_tokens": 0, "temperature": 0},
            return_logprob=True,
            logprob_start_len=len(one.prompt),
            top_logprobs_num=TOP,
            log_metrics=False,
            **one.same,
        )
        try:
            answers = [answer async for answer in self.manager.generate_request(request)]
        except asyncio.CancelledError:
            self.manager.abort_request(request.rid)
            raise
        about = answers[-1]["meta_info"]
        listed = about["input_top_logprobs"][1:]
        if len(listed) != len(one.tokens) - 1:
            raise ValueError(f"{len(listed)} of {len(one.tokens) - 1} tokens were scored")
        exact = (
            np.array([[token for _, token, _ in step] for step in listed]),
            np.array([[value for value, _, _ in step] for step in listed], dtype=np.float64),
        )
        seen = (np.array(one.ids[1:]), np.array(one.log_probs[1:], dtype=np.float64))
        return divergence_at_least(exact, seen, one.temperature)

    async def _report(self) -> None:
        numbers = flatten(self._window.report(self._counts).as_numbers())
        request = resolve(f"{_IO}.SetInternalStateReq")(server_args=numbers)
        try:
            await self.manager.set_internal_state(request)
        except Exception as error:
            self._failed(error)
