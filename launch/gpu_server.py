"""Proves a real SGLang server on this machine, step by step: the audit's list, then speed.

    python -m launch.gpu_server             every step of every model that has no result yet
    python -m launch.gpu_server --dry-run   the same steps on the CPU engine, on a tiny model

Each step is a cell of ``gpu_server.jsonl`` in ${OUT:-benchmarks/results/<hardware>}: what is there
is not run again (--again STEP), and a step that is killed loses itself alone. A step ends within
--limit seconds, 600 unless said otherwise. Weights are random, in the models' true shapes.

Nothing is brought along for these steps: they need an environment with SGLang 0.5.23, whose torch
2.14.1 does not fit into 64 MiB. On a machine with SGLang 0.5.17 and torch 2.11 (the wheels of
launch/gpu_wheels.sh) they say so: that release lacks ``ServerArgs.resolve_once``, the controller of
internal state and ``register_moe_runner_backend_name``, which the plugin needs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import result_path
from benchmarks.serving.compared_answers import last_words
from launch.gpu_server_models import MODELS, TINY, layers_that_fit, write_model
from launch.gpu_server_steps import Machine, steps
from sere_sglang.measure.cells import Cells


def main() -> int:
    options = _options()
    at = Machine(dry=options.dry_run)
    out = options.out or result_path("gpu_server").parent
    out.mkdir(parents=True, exist_ok=True)
    cells = Cells(out / "gpu_server.jsonl")
    models = {"tiny": TINY} if at.dry else MODELS
    todo = steps(at)
    unknown = set(options.only or ()) - set(todo)
    if unknown:
        print(f"no step is named {', '.join(unknown)}; there are {', '.join(todo)}")
        return 2
    ends = time.monotonic() + options.budget
    failed = False
    for step, run in todo.items():
        for name, config in models.items():
            if options.only and step not in options.only:
                continue
            key = {"model": name, "step": step, "dry": at.dry}
            seen = None if step in options.again else cells.get(key)
            if seen is None or "skipped" in seen:  # the machine may be another one
                left = min(options.limit, ends - time.monotonic())
                if left < 20:
                    print("no time left; the same command goes on")
                    return 1
                model = write_model(config, out / "models" / name, _layers(config, at))
                seen = _within(left, run, at, model)
                cells.add(key, seen)
            failed |= not seen["passed"]
            print(f"{_verdict(seen)}  {name}  {step}: {_told(seen)}")
    return int(failed)


def _within(seconds: float, run: Any, at: Machine, model: Path) -> dict[str, Any]:
    """What a step saw, or that it failed; servers that it started end with it."""
    began = time.monotonic()
    try:
        with _alarm(int(seconds)):
            seen = run(at, model)
    except Exception as error:
        seen = {"passed": False, "why": last_words(error)}
    about = {"seconds": round(time.monotonic() - began), "torch": torch.__version__}
    return {**seen, **about, "date": datetime.date.today().isoformat()}


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _layers(config: dict[str, Any], at: Machine) -> int:
    if at.dry:
        return int(config["num_hidden_layers"])
    return layers_that_fit(config, float(torch.cuda.get_device_properties(0).total_memory))


def _verdict(seen: dict[str, Any]) -> str:
    if "skipped" in seen:
        return "skipped"
    return "passed" if seen["passed"] else "FAILED"


def _told(seen: dict[str, Any]) -> str:
    return ", ".join(f"{k}: {v}" for k, v in seen.items() if k not in ("passed", "torch", "date"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU engine, a tiny model")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run no others")
    parser.add_argument("--again", nargs="+", default=[], metavar="STEP", help="run these anew")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a step may take")
    parser.add_argument("--budget", type=float, default=1800, help="seconds in all")
    parser.add_argument("--out", type=Path, help="where results and models go")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
