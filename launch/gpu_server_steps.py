"""The steps of launch/gpu_server.py: each starts the servers that it needs and says what it saw."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import random
import re
import statistics
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.compared_answers import first_difference, last_words
from benchmarks.serving.experiment import IMPORTS_CHECKOUT, TWO_RANKS
from launch import gpu_moe_layer, gpu_rank_counters
from launch.gpu_server_models import write_model
from sere_sglang.measure.routing import ADAPTIVE, AUTO, OFF, Routing, routing_of, static
from sere_sglang.measure.server import NotServing, Server, serve
from sere_sglang.measure.turns import decode_speeds

DUMMY = ("--load-format=dummy", "--skip-tokenizer-init")
SERE = ("--moe-backend=sere", "--sere-primary-k=1")
SIMILARITY: dict[str, Any] = {
    "flags": (*SERE, "--sere-policy=static"),
    "routings": (static(1), static(2), static(3), ADAPTIVE),
}
EVERY_RULE: dict[str, Any] = {
    "flags": ("--moe-backend=sere", "--sere-rule=auto"),
    # The random profile says nothing of losses: what the kernel drops is by its weights alone.
    "routings": (routing_of("energy=0.02"), routing_of("energy=0.1"), AUTO),
}
"""Of a server whose CUDA graphs have the other rules' kernels as well."""
TIE = 0.05  # nats between the two best tokens, below which either may come
SORTS_WIDE_ROWS = "flashinfer_cutlass"  # by a kernel of its own, rows of 10 slots for instance
NOISE = 3.0  # times as far apart as exact routing is: still the kernels' rounding


class Machine:
    """Where servers run, and in which sizes. dry: on the CPU engine; serve: starts one."""

    def __init__(self, *, dry: bool, serve: Callable[..., Any] = serve) -> None:
        self.dry, self.serve = dry, serve
        self.device = "cpu" if dry else "cuda"
        self.batches = (1, 4) if dry else (1, 2, 4, 8, 16, 32, 64, 128)
        self.alike, self.tokens, self.rounds = (4, 8, 1) if dry else (64, 32, 6)
        self.speed_tokens = 24 if dry else 192
        # The first is what the others' answers are compared with.
        self.runners = ("auto",) if dry else ("triton", "flashinfer_cutlass", "deep_gemm")
        self.gpus = torch.cuda.device_count()

    @contextlib.contextmanager
    def server(
        self, model: Path, *flags: str, env: Mapping[str, str] | None = None
    ) -> Iterator[Server]:
        given = {**IMPORTS_CHECKOUT, **(env or {})}
        with tempfile.TemporaryDirectory() as logs:
            log = Path(logs, "server.log")
            with self.serve(model, log, *DUMMY, *flags, device=self.device, env=given) as server:
                yield server

    def prompts(self, model: Path, count: int, *, alike: bool = False) -> list[list[int]]:
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        made = random.Random(0)
        rows = [[made.randrange(10, vocabulary) for _ in range(24)] for _ in range(count)]
        return [rows[0]] * count if alike else rows

    def answers(self, server: Server, prompts: list[list[int]]) -> list[Any]:
        sampling = {"temperature": 0, "max_new_tokens": self.tokens, "ignore_eos": True}
        body = {"input_ids": prompts, "sampling_params": sampling}
        return server.post("/generate", {**body, "return_logprob": True, "top_logprobs_num": 2})


def exact(at: Machine, model: Path) -> dict[str, Any]:
    """SERE switched off gives plain SGLang's tokens; switched on, every layer loads fewer."""
    prompts = at.prompts(model, 4)
    with at.server(model) as plain:
        wanted = at.answers(plain, prompts)
    with at.server(model, *SERE) as server:
        server.set_sere(enabled=False)
        differs = first_difference(wanted, at.answers(server, prompts), TIE)
        server.set_sere(enabled=True, min_batch=1, reset_counters=True)
        at.answers(server, at.prompts(model, at.alike))
        state = server.sere()
    seen = state["counters"].items()
    silent = [i for i, row in seen if row["active_after"] >= row["active_before"]]
    return {
        "passed": not differs and not silent and not state["failed"],
        "off": differs or "plain SGLang's tokens",
        "layers that re-route nothing": silent,
    }


def runners(at: Machine, model: Path) -> dict[str, Any]:
    """Each MoE runner on re-routed rows, apart and alike, so that all slots meet on S experts: one
    layer beside a plain MoE in torch on the same ids (launch/gpu_moe_layer.py), FlashInfer's
    CUTLASS with ten slots a row too. Then whole answers to prompts made alike, out of captured
    graphs: as far from the first runner's as they are under exact routing."""
    found: dict[str, Any] = {}
    kept: dict[str, dict[str, list[float]]] = {}
    for runner in at.runners:
        try:
            found[runner], answers = _runner(at, model, runner)
        except (NotServing, OSError, urllib.error.URLError) as error:
            found[runner] = {"not here": last_words(error)}
            continue
        if found[runner]["layer"]["reads up first"]:
            found[runner]["answers"] = "not compared: on dummies this runner computes another model"
            continue
        kept[runner] = answers
        base = kept[next(iter(kept))]
        apart = {name: _apart(base[name], answers[name]) for name in ("off", "S=1")}
        found[runner]["answers"] = apart
        found[runner]["passed"] &= apart["S=1"] <= NOISE * apart["off"] + 0.02
    judged = [each for each in found.values() if "passed" in each]
    return {"passed": bool(judged) and all(each["passed"] for each in judged), "runners": found}


def _runner(at: Machine, model: Path, runner: str) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What a layer makes of re-routed rows, and the answers off and at S=1."""
    flag = f"--moe-runner-backend={runner}"
    answers: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        plugin = gpu_moe_layer.environment(Path(folder))
        with at.server(model, *SERE, flag, env=plugin) as server:
            layer = gpu_moe_layer.seen_in(Path(folder))
            for name, changes in (("off", {"enabled": False}), ("S=1", {"enabled": True})):
                server.set_sere(**changes, min_batch=1)
                prompts = at.prompts(model, at.alike, alike=True)
                answers[name] = _first_logprobs(at.answers(server, prompts))
    wide = wide_layer(at, model, flag) if runner == SORTS_WIDE_ROWS else {}
    passed = layer["passed"] and wide.get("passed", True)
    told = {name: _without_cases(seen) for name, seen in (("layer", layer), ("top-10", wide))}
    return {"passed": passed} | {name: seen for name, seen in told.items() if seen}, answers


def wide_layer(at: Machine, model: Path, flag: str) -> dict[str, Any]:
    """What a layer makes of re-routed rows of ten slots, in a server of two layers."""
    config = json.loads((model / "config.json").read_text()) | {"num_experts_per_tok": 10}
    wide = write_model(config, model.with_name(f"{model.name}-top10"), layers=2)
    with tempfile.TemporaryDirectory() as folder:
        plugin = gpu_moe_layer.environment(Path(folder))
        with at.server(wide, *SERE, flag, "--disable-cuda-graph", env=plugin):
            return gpu_moe_layer.seen_in(Path(folder))


def _without_cases(seen: dict[str, Any]) -> dict[str, Any]:
    """As long as all is well; what is wrong is shown case by case."""
    return {k: v for k, v in seen.items() if k != "cases" or not seen["passed"]}


def ranks(at: Machine, model: Path) -> dict[str, Any]:
    """Two ranks of one server, re-routing: each must count the same in every layer. Ranks whose
    router logits differ by a bit may load different experts, and the sum of their outputs is then
    no token's."""
    if not at.dry and at.gpus < 2:
        why = f"--tp-size 2 needs two GPUs, this machine has {at.gpus}"
        return {"passed": True, "skipped": why}
    with tempfile.TemporaryDirectory() as folder:
        env = gpu_rank_counters.environment(Path(folder)) | (TWO_RANKS if at.dry else {})
        with at.server(model, *SERE, "--tp-size=2", env=env) as server:
            server.set_sere(enabled=True, min_batch=1, reset_counters=True)
            at.answers(server, at.prompts(model, at.alike))
            counted = gpu_rank_counters.counted(server, Path(folder), ranks=2)
    first, second = counted.values()
    apart = [
        f"layer {layer}: {first[layer]} and {second[layer]}"
        for layer in first
        if first[layer] != second[layer]
    ]
    silent = [layer for layer, row in first.items() if not row["rerouted"]]
    return {
        "passed": not apart and not silent,
        "apart": apart[:4],
        "layers apart": len(apart),
        "layers that re-route nothing": silent,
        "rerouted": sum(row["rerouted"] for row in first.values()),
    }


def with_flags(at: Machine, model: Path, *, flags: tuple[str, ...]) -> dict[str, Any]:
    """The same server with and without SERE under flags that change how forwards run."""
    try:
        with at.server(model, *flags) as plain:
            wanted = at.answers(plain, at.prompts(model, 2))
    except (NotServing, OSError, urllib.error.URLError) as error:
        return {"passed": True, "not here": f"plain SGLang: {last_words(error)}"}
    with at.server(model, *SERE, *flags) as server:
        server.set_sere(enabled=False)
        differs = first_difference(wanted, at.answers(server, at.prompts(model, 2)), TIE)
        server.set_sere(enabled=True, min_batch=1, reset_counters=True)
        at.answers(server, at.prompts(model, 4))
        rows = list(server.sere()["counters"].values())
    reroutes = all(row["active_after"] < row["active_before"] for row in rows)
    return {"passed": not differs and reroutes, "off": differs or "plain SGLang's tokens"}


def launches(at: Machine, model: Path) -> dict[str, Any]:
    """What torch's profiler sees in four forwards: our launches, and the copies and waits of both
    servers, of which SERE may add one copy a forward."""
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in (("plain", ()), ("sere", SERE)):
            with at.server(model, *flags) as server:
                if flags:
                    server.set_sere(enabled=True, min_batch=1)
                at.answers(server, at.prompts(model, 4))  # warm
                where = Path(folder, name)
                kinds = ["CPU"] if at.dry else ["CPU", "GPU"]
                _post(
                    server, "/start_profile", output_dir=str(where), num_steps=4, activities=kinds
                )
                at.answers(server, at.prompts(model, 4))
                counts[name] = _traced(where)
    ours = {name: n for name, n in counts["sere"].items() if re.search("sere|reroute", name)}
    waits = {
        name: {kind: n for kind, n in seen.items() if re.search("Synchronize|Memcpy", kind)}
        for name, seen in counts.items()
    }
    return {"passed": bool(ours), "ours": ours, "copies and waits": waits}


def tpot(
    at: Machine, model: Path, *, batch: int, flags: Sequence[str], routings: Sequence[Routing]
) -> dict[str, Any]:
    """Milliseconds per token of a server with `flags`, off and at `routings`, rounds in turns."""
    routings = [OFF, *routings]
    with at.server(model, *flags) as server:
        speeds = decode_speeds(
            {"sere": server},
            routings,
            at.prompts(model, batch),
            rounds=at.rounds,
            tokens=at.speed_tokens,
            advance=lambda: None,
        )
    rows = {
        routing.name: {
            "tpot_p50_ms": round(speed.gap_ms(50), 3),
            "tpot_p99_ms": round(speed.gap_ms(99), 3),
            "over_off": speed.over(speeds[OFF]) if at.rounds >= 6 else None,
        }
        for routing, speed in speeds.items()
    }
    return {"passed": True, "rows": rows}


def steps(at: Machine) -> dict[str, Callable[[Machine, Path], dict[str, Any]]]:
    """In the order in which they are worth having."""
    compiled = ("--enable-torch-compile", "--torch-compile-max-bs=4")
    return {
        "exact": exact,
        "runners": runners,
        "ranks": ranks,
        "compile": functools.partial(with_flags, flags=compiled),
        "speculation": functools.partial(with_flags, flags=("--speculative-algorithm=NGRAM",)),
        "launches": launches,
        **{f"tpot {n}": functools.partial(tpot, batch=n, **SIMILARITY) for n in at.batches},
        **{
            f"tpot {n}, rules": functools.partial(tpot, batch=n, **EVERY_RULE)
            for n in at.batches[1::2]
        },
    }


def _first_logprobs(answers: list[Any]) -> list[float]:
    """Of the decoded tokens that all answers were asked for, up to where they part."""
    return [e[0] for a in answers for e in a["meta_info"]["output_token_logprobs"][1:3]]


def _apart(one: list[float], other: list[float]) -> float:
    return statistics.fmean(abs(a - b) for a, b in zip(one, other, strict=True))


def _post(server: Server, path: str, **body: Any) -> None:
    """To a route that answers with a line of text."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
    urllib.request.urlopen(request, timeout=120).close()


def _traced(folder: Path) -> Counter[str]:
    """Name -> events of a finished profile, which SGLang writes when its steps are over."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in folder.rglob("*.trace.json.gz"):
            with contextlib.suppress(OSError, EOFError, ValueError):  # not whole yet
                events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
                return Counter(e["name"] for e in events if e.get("ph") == "X")
        time.sleep(0.5)
    raise OSError(f"no profile in {folder}")
