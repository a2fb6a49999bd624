"""Which of SGLang's configurations were run with re-routing, and how far: real servers, one after
another, each beside the same server without the flag.

    python -m benchmarks.coverage                every configuration that is not in the results yet
    python -m benchmarks.coverage --again NAME   those again

A configuration passes when both servers start and finish, the answers with SERE switched off are
plain SGLang's, and with it on every MoE layer re-routes and every request still finishes. Answers
are compared up to ties, for our CPU MoE runner rounds to bfloat16 in other places, and not at all
where plain SGLang does not give them twice. What plain SGLang cannot do on this machine is said so
with its own words. Writes ``coverage.json`` as it goes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import subprocess
import tempfile
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks._common import result_path, write_result
from benchmarks.serving.adapter import write_adapter
from benchmarks.serving.compared_answers import first_difference, last_words
from benchmarks.serving.experiment import IMPORTS_CHECKOUT, TWO_RANKS, heldout_prompts
from sere_sglang.errors import PREFIX
from sere_sglang.measure.server import CPU_ENGINE, CPU_FLAGS, NotServing, Server, serve

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "demo_model"
TOKENS, TIE = 24, 0.15  # nats between the two best tokens, below which either may come
ADAPTER = "ADAPTER"
"""In a flag: the folder of `benchmarks.serving.adapter`'s LoRA adapter."""
STATIC, HARDEST = ("--moe-backend=sere", "--sere-policy=static"), ("--sere-primary-k=1",)


@dataclass(frozen=True)
class Configuration:
    """drops: of `CPU_FLAGS`. asks: what requests hold beside their text. arbitrary: why answers are
    not even plain SGLang's own a second time, so that none are compared."""

    name: str
    flags: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    asks: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    arbitrary: str = ""


_RADIX = ("--disable-radix-cache",)
CONFIGURATIONS = (
    Configuration("defaults of the CPU engine"),
    Configuration("radix cache", drops=_RADIX),
    Configuration("chunked prefill", ("--chunked-prefill-size=32",)),
    Configuration("mixed chunks", ("--chunked-prefill-size=32", "--enable-mixed-chunk")),
    Configuration("no overlap schedule", ("--disable-overlap-schedule",)),
    Configuration("tensor parallel", ("--tp-size=2",)),
    Configuration("expert parallel", ("--tp-size=2", "--ep-size=2")),
    Configuration(
        "expert parallel, rule energy",
        ("--tp-size=2", "--ep-size=2", "--sere-rule=energy", "--sere-quality-budget=0.1"),
    ),
    Configuration("pipeline parallel", ("--pp-size=2",)),
    Configuration("data parallel", ("--dp-size=2",)),
    Configuration("DP attention", ("--tp-size=2", "--dp-size=2", "--enable-dp-attention")),
    Configuration("rule energy", ("--sere-rule=energy", "--sere-quality-budget=0.1")),
    Configuration("n-gram speculation", ("--speculative-algorithm=NGRAM",)),
    Configuration(
        "n-gram speculation, rule energy",
        ("--speculative-algorithm=NGRAM", "--sere-rule=energy", "--sere-quality-budget=0.1"),
    ),
    Configuration("torch.compile", ("--enable-torch-compile", "--torch-compile-max-bs=4")),
    Configuration("fp8 weights", ("--quantization=fp8",)),
    Configuration("int8 weights", ("--quantization=w8a8_int8",)),
    Configuration("return_logprob of the prompt", asks={"logprob_start_len": 0}),
    Configuration("n = 2", sampling={"n": 2}),
    Configuration("structured output", sampling={"regex": "[a-z ]{8,40}", "ignore_eos": False}),
    Configuration("penalties", sampling={"frequency_penalty": 0.5, "presence_penalty": 0.2}),
    Configuration("deterministic inference", ("--enable-deterministic-inference",)),
    Configuration("two-batch overlap", ("--enable-two-batch-overlap",)),
    Configuration(
        "LoRA, half of the requests with an adapter",
        ("--enable-lora", f"--lora-paths=demo={ADAPTER}", "--lora-backend=torch_native"),
        asks={"lora_path": ["demo", None, "demo", None]},
    ),
    Configuration(
        "PD disaggregation, a decode server whose KV transfer SGLang fakes",
        ("--disaggregation-mode=decode", "--disaggregation-transfer-backend=fake"),
        asks={"bootstrap_host": "2.2.2.2", "bootstrap_room": [1, 2, 3, 4]},
        arbitrary="a faked first token is any",
    ),
    Configuration(
        "PD disaggregation, a prefill server with Mooncake over TCP",
        ("--disaggregation-mode=prefill", "--disaggregation-transfer-backend=mooncake_tcp"),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="run these anew")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run no others")
    asked = parser.parse_args()
    known = [c.name for c in CONFIGURATIONS]
    for name in [*asked.again, *(asked.only or ())]:
        if name not in known:
            parser.error(f"no configuration is named {name}; there are {', '.join(known)}")
    rows = {row["configuration"]: row for row in _former() if row["configuration"] in known}
    prompts = [text.prompt for text in heldout_prompts(MODEL)[:4]]
    console = Console()
    for configuration in CONFIGURATIONS:
        name = configuration.name
        left_out = asked.only is not None and name not in asked.only
        if left_out or (name in rows and name not in asked.again):
            continue
        row = run(configuration, prompts)
        rows[name] = row
        write_result("coverage", [rows[n] for n in known if n in rows], model=MODEL.name)
        console.print(f"{name:32} {row['result']:10} {row['why']}", highlight=False)


def run(configuration: Configuration, prompts: list[str]) -> dict[str, Any]:
    """``{"configuration", "flags", "result", "why", "date", "commit"}``. result: passed, failed,
    refused (SERE says at start that it cannot be had there) or not here (plain SGLang does not)."""
    about = {
        "configuration": configuration.name,
        "flags": list(configuration.flags),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }
    ours = tuple(flag for flag in configuration.flags if flag.startswith("--sere"))
    flags = tuple(flag for flag in configuration.flags if flag not in ours)
    with tempfile.TemporaryDirectory() as folder:
        if any(ADAPTER in flag for flag in flags):
            adapter = str(write_adapter(MODEL, Path(folder, "adapter")))
            flags = tuple(flag.replace(ADAPTER, adapter) for flag in flags)
        try:
            with _server(configuration, flags, Path(folder, "plain.log")) as plain:
                wanted = _answers(plain, prompts, configuration)
        except (NotServing, urllib.error.URLError, OSError, ValueError) as error:
            return {**about, "result": "not here", "why": f"plain SGLang: {last_words(error)}"}
        try:
            with _server(
                configuration, (*flags, *STATIC, *(ours or HARDEST)), Path(folder, "sere.log")
            ) as sere:
                return {**about, **_judged(sere, prompts, configuration, wanted)}
        except NotServing as error:
            told = [x for x in error.log.read_text().splitlines() if PREFIX in x]
            if told:
                return {**about, "result": "refused", "why": told[0].split("error: ", 1)[1]}
            return {**about, "result": "failed", "why": last_words(error)}
        except (urllib.error.URLError, OSError, ValueError) as error:
            return {**about, "result": "failed", "why": last_words(error)}


@contextlib.contextmanager
def _server(configuration: Configuration, flags: tuple[str, ...], log: Path) -> Iterator[Server]:
    """All flags are given here: `serve` adds the CPU engine's, of which some may be dropped."""
    kept = [flag for flag in CPU_FLAGS if flag not in configuration.drops]
    env = {**IMPORTS_CHECKOUT, **CPU_ENGINE}
    ranks = any(f in configuration.flags for f in ("--tp-size=2", "--pp-size=2", "--dp-size=2"))
    if ranks:
        env |= TWO_RANKS
    with serve(MODEL, log, *kept, *flags, device="cuda", env=env) as server:  # adds no flags
        yield server


def _judged(
    sere: Server, prompts: list[str], configuration: Configuration, wanted: list[Any]
) -> dict[str, str]:
    sere.set_sere(enabled=False, reset_counters=True)
    off = _answers(sere, prompts, configuration)
    differs = "" if configuration.arbitrary else first_difference(wanted, off, TIE)
    if differs:
        return {"result": "failed", "why": f"SERE off is not plain SGLang: {differs}"}
    sere.set_sere(enabled=True, min_batch=1, reset_counters=True)
    answers = _answers(sere, prompts, configuration)
    if len(answers) != len(wanted):
        return {"result": "failed", "why": f"{len(answers)} of {len(wanted)} answers with SERE on"}
    states = sere.get("/server_info")["internal_states"]
    counters = [row for state in states for row in state["sere"]["counters"].values()]
    if any(state["sere"]["failed"] for state in states):
        return {"result": "failed", "why": str(states[0]["sere"]["failed"])}
    before, after = (
        sum(row[name] for row in counters) / max(1, sum(row["forwards"] for row in counters))
        for name in ("active_before", "active_after")
    )
    if not after < before:
        return {"result": "failed", "why": "no layer re-routed"}
    why = f"active experts {before:.1f} -> {after:.1f}"
    if configuration.arbitrary:
        why += f"; answers not compared, {configuration.arbitrary}"
    return {"result": "passed", "why": why}


def _answers(server: Server, prompts: list[str], configuration: Configuration) -> list[Any]:
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    body = {
        "text": prompts,
        "sampling_params": sampling | configuration.sampling,
        "return_logprob": True,
        "top_logprobs_num": 2,
        **configuration.asks,
    }
    return server.post("/generate", body)


def _former() -> list[dict[str, Any]]:
    path = result_path("coverage")
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _commit() -> str:
    git = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
