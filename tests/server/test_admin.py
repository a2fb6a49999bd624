"""A server with keys: who may change what, what is shown to whom, and wishes on every API."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sere_sglang.options import SereConfig
from tests.server.harness import SERE, Server, refusal_of, serve

USER, ADMIN = "key-of-a-user", "key-of-the-admin"
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def keyed(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "chat.jinja").write_text(CHAT)
    flags = (f"--api-key={USER}", f"--admin-api-key={ADMIN}", "--enable-metrics",
             f"--chat-template={folder / 'chat.jinja'}")  # fmt: skip
    with serve(
        checkpoint("qwen3_moe"), folder / "log", *SERE, *flags, whole_batches=False
    ) as server:
        yield server


def _ask(server: Server, path: str, body: Any = None, key: str | None = USER) -> tuple[int, str]:
    """(status, text) of a request; a POST if there is a body."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(server.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


def _primary_k(server: Server) -> int:
    return json.loads(_ask(server, "/server_info")[1])["internal_states"][0]["sere"]["primary_k"]


def test_settings_are_the_admins_as_sglang_has_it(keyed: Server) -> None:
    change = {"server_args": {"sere": {"primary_k": 2}}}
    for key in (None, "wrong", USER):
        assert _ask(keyed, "/set_internal_state", change, key)[0] == 401
        # Whoever has no key does not learn either what would be wrong with a change.
        assert (
            "sere" not in _ask(keyed, "/set_internal_state", {"server_args": {"sere": 1}}, key)[1]
        )
    assert _primary_k(keyed) == 1
    assert _ask(keyed, "/set_internal_state", change, ADMIN) == (200, "[true]")
    assert _primary_k(keyed) == 2
    change["server_args"]["sere"]["primary_k"] = 1
    assert _ask(keyed, "/set_internal_state", change, ADMIN)[0] == 200


def test_state_is_shown_to_whom_sglang_shows_its_own(keyed: Server) -> None:
    for key, status in ((None, 401), ("wrong", 401), (USER, 200)):
        assert _ask(keyed, "/server_info", key=key)[0] == status
    assert "sglang:sere_" in _ask(keyed, "/metrics", key=None)[1]  # as all of SGLang's metrics


def test_nothing_of_ours_shows_a_key_or_a_path_but_the_flags(keyed: Server) -> None:
    info = json.loads(_ask(keyed, "/server_info")[1])
    options = SereConfig().as_dict().keys()
    ours = [{k: v for k, v in info.items() if k in options}, info["sere"]]
    ours += [state["sere"] for state in info["internal_states"]]
    text, metrics = json.dumps(ours), _ask(keyed, "/metrics", key=None)[1]
    assert "primary_k" in text
    for secret in (USER, ADMIN):
        assert secret not in text and secret not in metrics
    shown = {value for value in _strings(ours) if value.startswith("/")}
    assert shown == {info["sere_profile"]}
    own = [line for line in metrics.splitlines() if line.startswith("sglang:sere_")]
    assert own and not any("profile" in line for line in own)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def test_top_takes_the_key(keyed: Server) -> None:
    command = [sys.executable, "-m", "sere_sglang.cli.main", "top", keyed.url, "--looks=1",
               "--every=0.1"]  # fmt: skip
    for key, status, said in (([], 2, "401"), ([f"--api-key={USER}"], 0, "active before")):
        done = subprocess.run([*command, *key], capture_output=True, text=True, check=False)
        assert done.returncode == status and said in done.stdout + done.stderr, done.stderr


APIS: dict[str, Callable[[Any], tuple[str, dict[str, Any]]]] = {
    "generate": lambda wish: (
        "/generate", {"text": "hi", "sampling_params": {"max_new_tokens": 1, **wish}},
    ),
    "one of a batch": lambda wish: (
        "/generate",
        {
            "text": ["hi", "ho"],
            "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 1, **wish}],
        },
    ),
    "tokens": lambda wish: (
        "/generate", {"input_ids": [[1, 2], [3]], "sampling_params": {"max_new_tokens": 1, **wish}},
    ),
    "completions": lambda wish: (
        "/v1/completions", {"model": "m", "prompt": "hi", "max_tokens": 1, **wish},
    ),
    "streamed completions": lambda wish: (
        "/v1/completions", {"model": "m", "prompt": "hi", "max_tokens": 1, "stream": True, **wish},
    ),
    "several completions": lambda wish: (
        "/v1/completions", {"model": "m", "prompt": ["hi", "ho"], "max_tokens": 1, **wish},
    ),
    "chat": lambda wish: (
        "/v1/chat/completions",
        {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, **wish},
    ),
}  # fmt: skip


@pytest.mark.parametrize("api", APIS)
def test_a_wish_that_would_be_ignored_is_refused_everywhere(keyed: Server, api: str) -> None:
    for params in ([{"sere": "exact"}], "x", 5, {"SERE": "exact"}, {"sere ": "exact"}, {"sere": 1}):
        status, text = _ask(keyed, *APIS[api]({"custom_params": params}))
        assert (status, "custom_params" in text) == (400, True), (params, text)


@pytest.mark.parametrize("api", APIS)
def test_params_of_others_stay_untouched(keyed: Server, api: str) -> None:
    """Those of a custom logit processor, for instance."""
    for params in (None, {}, {"token_ids": [1], "serenity": "exact"}, {"mine": 1, "sere": "exact"}):
        status, text = _ask(keyed, *APIS[api]({"custom_params": params}))
        assert status == 200, (params, text)


@pytest.mark.parametrize("flag", ["--sere-profile", "--sere-cost"])
def test_an_over_long_path_is_one_line(checkpoint: Callable[[str], Path], flag: str) -> None:
    model = checkpoint("qwen3_moe")
    done = refusal_of(f"--model-path={model}", *SERE, f"{flag}={'x' * 9000}")
    errors = [x for x in done.stderr.splitlines() if x.startswith("sere-sglang: error:")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr[-2000:]
    assert flag in errors[0] and len(errors[0]) < 900
    assert not any(x.startswith("Traceback") for x in done.stderr.splitlines())
