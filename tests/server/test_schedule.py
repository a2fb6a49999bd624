"""Skipping that follows the live batch, in a real server."""

from __future__ import annotations

import concurrent.futures
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sere_sglang.schedule.cost import StepModel
from sere_sglang.schedule.trace import TraceStep, read_trace
from tests.server.checks import top
from tests.server.cost_files import write_cost
from tests.server.harness import Server, refusal_of, serve

PROMPTS = [f"request number {i} " * (1 + i % 3) for i in range(12)]
STATIC = {"policy": "static", "primary_k": 1, "threshold": 0.0, "min_batch": 1, "enabled": True}
EAGER = {"policy": "adaptive", "quality_budget": 1.0, "min_gain": 0.0, "min_batch": 3}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace") / "trace.jsonl"


@pytest.fixture(scope="module")
def server(
    checkpoint: Callable[[str], Path], trace: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    model = checkpoint("qwen3_moe")
    # However fast this machine is, a step takes what its experts take.
    cost = write_cost(model, trace.with_name("cost.json"), step=StepModel())
    flags = (
        "--moe-backend=sere",
        f"--sere-cost={cost}",
        "--sere-allow-quality=exact,balanced,fast",
        f"--sere-trace={trace}",
        "--enable-metrics",
        "--decode-log-interval=5",
    )
    log = tmp_path_factory.mktemp("logs") / "schedule.log"
    with serve(model, log, *flags) as server:
        yield server


def test_adaptive_is_the_default_and_follows_the_load(server: Server, trace: Path) -> None:
    assert server.sere()["policy"] == "adaptive"
    server.set_sere(**EAGER)
    server.generate(PROMPTS[:1], 70)
    server.generate(PROMPTS, 70)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # prefill in between
        list(pool.map(lambda i: server.generate([PROMPTS[i]], 5 + 8 * i), range(8)))
    steps = _written(server, trace)
    one = [s for s in steps if s.composition.mode == "decode" and s.composition.num_tokens == 1]
    many = [s for s in steps if s.composition.mode == "decode" and s.composition.num_tokens > 3]
    prefill = [s for s in steps if s.composition.mode == "extend"]
    assert one and not any(s.point.enabled for s in one)
    assert many and all(s.point.enabled for s in many)
    assert prefill and not any(s.point.enabled for s in prefill)
    assert max(s.composition.running for s in steps) == len(PROMPTS)
    numbers = [s.composition.step for s in steps]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_nothing_to_gain_means_exact(server: Server, trace: Path) -> None:
    """16 experts, 4 per token: 12 rows that skip all they can still load more than half of them."""
    server.set_sere(**EAGER | {"min_gain": 1.0})
    before = len(_written(server, trace))
    server.generate(PROMPTS, 70)
    steps = _written(server, trace)[before:]
    assert not any(s.point.enabled for s in steps)


@pytest.mark.parametrize("api", ["native", "openai"])
def test_an_exact_request_gets_what_plain_routing_gives_it(server: Server, api: str) -> None:
    """Whoever shares the batch: same tokens and log-probs as with re-routing switched off."""
    server.set_sere(**STATIC)
    qualities = ["exact", "balanced", "fast", None]
    asked = [qualities[i % 4] for i in range(len(PROMPTS))]
    mixed = _ask(server, api, asked)
    server.set_sere(enabled=False)
    exact = _ask(server, api, [None] * len(PROMPTS))
    server.set_sere(enabled=True)
    assert any(a != b for a, b in zip(mixed, exact, strict=True)), "nothing was re-routed"
    for i, quality in enumerate(asked):
        if quality == "exact":
            assert mixed[i][0] == exact[i][0]
            assert mixed[i][1] == pytest.approx(exact[i][1], abs=0.02)


def test_fast_requests_are_rerouted_harder(server: Server) -> None:
    server.set_sere(**STATIC | {"primary_k": 3}, fast_primary_k=1)
    moved = []
    for quality in ("exact", "balanced", "fast"):
        server.set_sere(reset_counters=True)
        _ask(server, "native", [quality] * len(PROMPTS))
        counters = server.sere()["counters"].values()
        moved.append(sum(row["rerouted"] for row in counters))
    assert moved[0] == 0 < moved[1] < moved[2]


@pytest.mark.parametrize("value", ["turbo", 7])
def test_a_quality_that_does_not_exist_is_refused(server: Server, value: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.generate(PROMPTS[:1], 2, **_sampling(value))
    assert refusal.value.code == 400
    assert "balanced, exact, fast" in refusal.value.read().decode()


def test_live_policy_and_slo(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.post("/set_internal_state", {"server_args": {"sere": {"policy": "slo"}}})
    assert "tpot_slo_ms" in refusal.value.read().decode()
    # Nothing can hold this one: it ends at the strongest point that the budget allows.
    server.set_sere(**EAGER | {"policy": "slo", "tpot_slo_ms": 0.01})
    server.generate(PROMPTS, 90)
    tight = server.sere()
    assert tight["policy"] == "slo" and tight["feedback"]["step_ms"] > 0
    assert tight["feedback"]["budget"] > 0 and tight["operating_point"]["enabled"]
    # Everything holds this one: back to exact.
    server.set_sere(tpot_slo_ms=100000.0)
    server.generate(PROMPTS, 300)
    assert not server.sere()["operating_point"]["enabled"]
    server.set_sere(**STATIC | {"tpot_slo_ms": None})
    server.generate(PROMPTS, 4)
    assert server.sere()["operating_point"] == {
        "name": "S=1 rho=0", "enabled": True, "rule": "similarity", "primary_k": 1,
        "threshold": 0.0, "layers": {},
    }  # fmt: skip


def test_changes_at_once_are_applied_or_told_why_not(server: Server) -> None:
    """Each is checked against the settings that it meets, whoever changes them meanwhile."""
    changes: list[dict[str, Any]] = [
        {"policy": "slo", "tpot_slo_ms": 25.0}, {"tpot_slo_ms": None}, {"policy": "slo"},
        {"policy": "adaptive"}, {"min_batch": 10, "max_batch": 12}, {"max_batch": 5},
        {"min_batch": 2}, {"max_batch": None},
    ]  # fmt: skip

    def change(number: int) -> Any:
        wanted = changes[number * 3 % len(changes)]
        try:
            return server.post("/set_internal_state", {"server_args": {"sere": wanted}})
        except urllib.error.HTTPError as refusal:
            assert refusal.code == 400
            return json.load(refusal)["error"]["message"]

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(change, range(64)))
    assert answers.count([True]) > 8, answers
    told = [answer for answer in answers if answer != [True]]
    assert not [t for t in told if not isinstance(t, str) or "meanwhile" in t], told
    server.set_sere(**STATIC | {"tpot_slo_ms": None, "max_batch": None})


def test_every_metric_is_there(server: Server) -> None:
    """By name, with its labels, after a load that has prefill, re-routed and exact decoding."""
    server.set_sere(**EAGER | {"policy": "slo", "tpot_slo_ms": 0.01, "min_batch": 3})
    server.generate(PROMPTS[:2], 20)
    server.generate(PROMPTS, 60)
    metrics = _metrics(server)

    def values(name: str, **labels: str) -> list[float]:
        found = metrics[f"sglang:sere_{name}"]
        return [value for have, value in found if labels.items() <= have.items()]

    for mode, rerouted in (("extend", "false"), ("decode", "true"), ("decode", "false")):
        assert values("forwards_total", mode=mode, rerouted=rerouted)[0] > 0
        assert values("batch_rows_count", mode=mode)[0] > 0
    assert values("batch_rows_bucket", mode="decode", le="4.0")[0] > 0
    state = server.sere()
    assert values("primary_k") == [state["operating_point"]["primary_k"]] != [0]
    assert values("threshold") == pytest.approx([state["operating_point"]["threshold"]])
    assert values("quality_budget")[0] > 0
    assert values("policy", policy="slo") == [1]
    assert values("policy", policy="static") == values("policy", policy="adaptive") == [0]
    assert values("tpot_slo_seconds") == pytest.approx([1e-5])
    assert 0 < values("predicted_step_seconds")[0] < 60 and 0 < values("step_seconds")[0] < 60
    assert values("tpot_seconds_count")[0] > 0 and values("tpot_seconds_sum")[0] > 0
    assert values("active_experts_count")[0] > 0
    for layer in state["counters"]:
        before = values("active_experts_before", layer=layer)[0]
        assert 0 < values("active_experts_after", layer=layer)[0] < before
        assert values("rerouted_slots", layer=layer)[0] > 0
        assert values("critical_slots", layer=layer)[0] >= 0

    server.set_sere(enabled=False)
    server.generate(PROMPTS, 40)
    metrics = _metrics(server)
    assert values("primary_k") == [0], "the gauge follows a policy that goes back to exact"
    assert not any(values("policy"))


def test_the_dashboard_asks_for_metrics_that_exist(server: Server) -> None:
    server.set_sere(**STATIC)
    server.generate(PROMPTS, 60)
    dashboard = (Path(__file__).parents[2] / "launch" / "grafana.json").read_text()
    asked = set(re.findall(r"sglang:sere_\w+", dashboard))
    assert asked <= _metrics(server).keys()
    # As Prometheus asks before 3.0, and keeps what it gets under deploy/'s configuration.
    config = Path(__file__).parents[2] / "deploy" / "prometheus" / "prometheus.yml"
    (job,) = yaml.safe_load(config.read_text())["scrape_configs"]
    (rule,) = job["metric_relabel_configs"]
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    request = urllib.request.Request(server.url + "/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request) as answer:
        samples = re.findall(r"^([\w:]+)\{", answer.read().decode(), re.MULTILINE)
    new_name = rule["replacement"].replace("$1", r"\1")
    kept = {re.sub(f"^{rule['regex']}$", new_name, name) for name in samples}
    assert rule["source_labels"] == ["__name__"] and rule["target_label"] == "__name__"
    assert asked <= kept


def test_the_decode_line(server: Server) -> None:
    server.set_sere(**STATIC)
    server.generate(PROMPTS, 60)
    lines = [x for x in server.log.read_text().splitlines() if "Decode batch" in x]
    assert any(
        re.search(r"sere: S=1 rho=0, active experts: [\d.]+ -> [\d.]+ \(\d+", x) for x in lines
    )
    server.set_sere(enabled=False)
    server.generate(PROMPTS, 60)
    last = [x for x in server.log.read_text().splitlines() if "Decode batch" in x][-1]
    assert "sere: exact" in last and "active experts" not in last


def test_top_shows_this_server(server: Server) -> None:
    server.set_sere(**STATIC, reset_counters=True)
    server.generate(PROMPTS, 30)
    state = server.sere()
    shown = top(server.url, "--looks=1", "--every=0.01")
    assert shown.returncode == 0, shown.stderr
    assert "policy static" in shown.stdout and "at S=1 rho=0" in shown.stdout
    assert f"decode, {len(PROMPTS)} rows, 0 waiting" in shown.stdout
    assert f"step {state['step_ms']:.2f} ms" in shown.stdout
    for layer, counters in state["counters"].items():
        n = counters["forwards"]
        numbers = [f"{counters[k] / n:.1f}" for k in ("active_before", "active_after", "rerouted")]
        line = next(x for x in shown.stdout.splitlines() if re.match(rf"\W+{layer}\W+\d", x))
        assert [x for x in re.findall(r"[\d.]+", line)[1:4]] == numbers


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--sere-policy=slo"], "add --sere-tpot-slo-ms"),
        (["--sere-policy=static", "--sere-tpot-slo-ms=5"], "--sere-policy slo, not of static"),
        (["--sere-quality-budget=2"], "--sere-quality-budget 2"),
        (["--sere-allow-quality=cheap"], "--sere-allow-quality cheap"),
        (["--sere-quality=fast", "--sere-allow-quality=exact"], "--sere-quality fast is not in"),
        (["--sere-fast-primary-k=4"], "--sere-fast-primary-k 4: must be smaller"),
    ],
)
def test_wrong_flags(checkpoint: Callable[[str], Path], flags: list[str], named: str) -> None:
    result = refusal_of(f"--model-path={checkpoint('qwen3_moe')}", "--moe-backend=sere", *flags)
    assert result.returncode == 2
    assert named in result.stderr


def _metrics(server: Server) -> dict[str, list[tuple[dict[str, str], float]]]:
    """SERE's samples on ``/metrics``: name -> (labels, value)."""
    with urllib.request.urlopen(server.url + "/metrics") as answer:
        text = answer.read().decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in text.splitlines():
        sample = re.fullmatch(r"(sglang:sere_\w+)\{(.*)\} (\S+)", line)
        if sample:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', sample[2]))
            found.setdefault(sample[1], []).append((labels, float(sample[3])))
    return found


def _written(server: Server, trace: Path) -> list[TraceStep]:
    server.set_sere(reset_counters=True)  # also writes out what the trace holds back
    return list(read_trace(trace))


def _sampling(quality: Any) -> dict[str, Any]:
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    if quality is not None:
        sampling["custom_params"] = {"sere": quality}
    return {"sampling_params": sampling}


def _ask(server: Server, api: str, qualities: list[str | None]) -> list[tuple[Any, list[float]]]:
    """All prompts at once, in one batch; (tokens or text, log-probs) of each."""
    if api == "native":
        each = [_sampling(quality)["sampling_params"] for quality in qualities]
        answers = server.post(
            "/generate", {"text": PROMPTS, "sampling_params": each, "return_logprob": True}
        )
        return [
            (a["output_ids"], [x[0] for x in a["meta_info"]["output_token_logprobs"]])
            for a in answers
        ]

    def one(i: int) -> tuple[Any, list[float]]:
        body = {"model": "m", "prompt": PROMPTS[i], "max_tokens": 12, "temperature": 0,
                "ignore_eos": True, "logprobs": 1}  # fmt: skip
        if qualities[i] is not None:
            body["custom_params"] = {"sere": qualities[i]}  # what extra_body puts here
        choice = server.post("/v1/completions", body)["choices"][0]
        return choice["text"], choice["logprobs"]["token_logprobs"]

    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(one, range(len(PROMPTS))))


def test_trace_lines_are_json(server: Server, trace: Path) -> None:
    _written(server, trace)
    for line in trace.read_text().splitlines():
        assert {"time", "mode", "step", "padded_rows", "point"} <= json.loads(line).keys()
