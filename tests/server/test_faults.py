"""Whatever of ours raises while a server serves: it goes on, exact, and says so."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.faults import Faults, install
from tests.server.harness import Server, serve

PROMPTS = [f"request number {i} " * (1 + i % 3) for i in range(12)]
TOKENS = 8
LOADER = "DefaultModelLoader."
MODEL_RUNNER = "fused_moe_native.moe_forward_native (around)"

# Hooks that run while a server starts, or where a CPU has another function.
NOT_WHILE_SERVING = {
    "Scheduler.__init__ (before)",
    "Scheduler.__init__ (after)",
    "Scheduler.get_init_info (after)",
    "ModelRunner.load_model (after)",
    "ServerArgs.resolve_once (around)",
    "ServerArgs.from_cli_args (around)",
    "ServerArgs.add_cli_args (after)",
    "Engine._launch_subprocesses (after)",
    "DataParallelController.get_init_info (after)",
    "topk.fused_topk (around)",
    "PrefillCudaGraphRunner.capture (around)",
    "DecodeCudaGraphRunner.capture_one_shape (around)",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3_moe")


@pytest.fixture(scope="module")
def server(model: Path, faults: Faults) -> Iterator[Server]:
    flags = ("--moe-backend=sere", "--sere-primary-k=1", "--enable-metrics",
             "--decode-log-interval=2", "--sere-shadow=1")  # fmt: skip
    log = faults.folder / "server.log"
    with serve(model, log, *flags, env=install(faults.folder)) as server:
        yield server


def test_every_hook_may_fail(server: Server, faults: Faults, model: Path) -> None:
    server.set_sere(enabled=False)
    exact = _tokens(server)
    server.set_sere(enabled=True)
    rerouted = _tokens(server)
    assert rerouted != exact
    _everything_else(server, model)
    hooks = faults.hooks()
    assert len(hooks) > 10
    silent = set()
    for hook in sorted(hooks):
        for when in ("before", "after"):
            what = f"{hook}, {when}"
            said = _warnings(server)
            faults.start(hook, when)
            server.generate(PROMPTS, TOKENS)
            _everything_else(server, model if LOADER in hook else None)
            if not faults.fired:
                silent.add(hook)
                break
            state = server.sere()
            assert state["failed"], what
            if "HTTP process" not in state["failed"]:
                assert hook in state["failed"] and "on purpose" in state["failed"], what
            told = [now - before for now, before in zip(_warnings(server), said, strict=True)]
            assert max(told) == 1 and min(told) >= 0, f"{what}: warned once by a process"
            assert _failed_metric(server) == 1, what
            answers = _tokens(server)
            if hook == MODEL_RUNNER:  # SGLang's own rounds in another order
                same = sum(a == b for a, b in zip(answers, exact, strict=True))
                assert same >= len(PROMPTS) - 2, what
            else:
                assert answers == exact, what
            faults.stop()
            server.set_sere(enabled=True)
            assert server.sere()["failed"] is None and _failed_metric(server) == 0, what
            assert _tokens(server) == rerouted, f"{what}: started again"
    assert silent <= NOT_WHILE_SERVING, "hooks that nothing here has tested"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"server_args":{"sere.policy":99}}', "unknown key 'sere.policy'"),
        ('{"server_args":{"sere.policy":1.5}}', '{"sere": {"policy": ...}}'),
        ('{"server_args":{"sere.min_batch":1e300}}', '{"sere": {"min_batch": ...}}'),
        ('{"server_args":{" Sere.primary_k":99}}', '{"sere": {"primary_k": ...}}'),
        ('{"server_args":{"sere.stop":1}}', "unknown key 'sere.stop'"),
        ('{"server_args":{"SERE":{"primary_k":1}}}', "unknown key 'SERE'"),
        ('{"server_args":{"sere":null}}', "expected an object"),
        ('{"server_args":{"sere":{"min_batch":1e300}}}', "min_batch must be a whole number"),
        ('{"server_args":{"sere":{"min_batch":1%s}}}' % ("0" * 400), "more than 60 digits"),
        ('{"server_args":{"sere":{"policy":"%s"}}}' % ("x" * 9000), "xxx..."),
        ('{"server_args":{"sere":{"threshold":NaN}}}', "NaN is not a number that JSON knows"),
        ('{"server_args":{"a":-Infinity}}', "-Infinity is not a number that JSON knows"),
        ('{"server_args":{"a":1e400}}', "'a' is too large"),
        ('{"server_args":{"a":1%s}}' % ("0" * 400), "'a' is too large"),
        ('{"server_args":{"a":"1"}}', "'a' must be a number, got '1'"),
        ('{"server_args":{"sere":{"reset":1}}}', "reset_counters"),
        ('{"server_args":[]}', 'expected {"server_args"'),
        ('{"server_args":', "the body is no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "the body is no JSON"),
    ],
)
def test_what_set_internal_state_refuses(server: Server, body: str, said: str) -> None:
    before = server.sere()
    request = urllib.request.Request(
        server.url + "/set_internal_state", body.encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=60)
    answer = json.loads(refusal.value.read())["error"]["message"]
    assert refusal.value.code == 400 and said in answer and len(answer) < 400
    assert server.sere() == before


@pytest.mark.parametrize("ids", [[-1], [5, 10**9], [[3], [-7]]], ids=str)
def test_tokens_that_are_none_are_refused(server: Server, ids: Any) -> None:
    """SGLang by itself would end."""
    before = _tokens(server)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.post("/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 2}})
    assert refusal.value.code == 400
    assert "input_ids must be whole numbers from 0 to" in refusal.value.read().decode()
    assert _tokens(server) == before


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({"input_ids": [[], [5]]}, "the prompt has no token"),
        ({"text": ""}, "the prompt has no token"),
        ({"input_ids": []}, "input_ids cannot be empty"),
    ],
)
def test_a_prompt_without_a_token_is_refused(
    server: Server, prompt: dict[str, Any], said: str
) -> None:
    """SGLang by itself refuses the last one, and would end at the others."""
    before = _tokens(server)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.post("/generate", prompt | {"sampling_params": {"max_new_tokens": 2}})
    assert refusal.value.code == 400 and said in refusal.value.read().decode()
    assert _tokens(server) == before


def test_all_or_nothing_with_sglangs_own_keys(server: Server) -> None:
    ours = {"sere": {"primary_k": 2}}
    for refused in ({"pp_max_micro_batch_size": 0}, {"no_such_key": 1}):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            server.post("/set_internal_state", {"server_args": refused | ours})
        answer = json.loads(refusal.value.read())["error"]["message"]
        assert refusal.value.code == 400
        assert answer == f"SGLang refuses {next(iter(refused))!r}; nothing was applied"
        assert server.sere()["primary_k"] == 1
    both = {"pp_max_micro_batch_size": 8} | ours
    assert server.post("/set_internal_state", {"server_args": both}) == [True]
    assert server.sere()["primary_k"] == 2
    server.set_sere(primary_k=1)


@pytest.mark.parametrize(
    ("custom_params", "said"),
    [
        ([{"sere": "exact"}], "must be an object"),
        ("x", "must be an object"),
        (5, "must be an object"),
        ({"SERE": "exact"}, "write"),
        ({"sere ": "exact"}, "write"),
        ({"sere": ["exact"]}, "must be one of"),
        ({"sere": "x" * 9000}, "xxx..."),
    ],
)
def test_a_wish_that_would_be_ignored_is_refused(
    server: Server, custom_params: Any, said: str
) -> None:
    sampling = {"max_new_tokens": 2, "custom_params": custom_params}
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.post("/generate", {"text": "hello", "sampling_params": sampling})
    answer = refusal.value.read().decode()
    assert refusal.value.code == 400 and said in answer and len(answer) < 400


def _tokens(server: Server) -> list[list[int]]:
    return [answer["output_ids"] for answer in server.generate(PROMPTS, TOKENS)]


def _everything_else(server: Server, model: Path | None) -> None:
    """What reaches the hooks that a generation does not."""
    server.get("/server_info")
    try:
        server.post("/set_internal_state", {"server_args": {"sere": {"min_batch": 1}}})
    except urllib.error.HTTPError as refusal:  # where what changes settings has failed
        assert refusal.code == 400 and "nothing was applied" in refusal.read().decode()
    if model is not None:
        assert server.post("/update_weights_from_disk", {"model_path": str(model)})["success"]


def _warnings(server: Server) -> list[int]:
    """Of schedulers and of the HTTP process."""
    log = server.log.read_text()
    return [log.count(x) for x in ("SERE failed and serving", "SERE failed in the HTTP process")]


def _failed_metric(server: Server) -> float:
    with urllib.request.urlopen(server.url + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    (line,) = (x for x in lines if x.startswith("sglang:sere_failed{"))
    return float(line.split()[-1])
