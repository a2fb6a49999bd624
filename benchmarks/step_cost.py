"""What SERE adds to a step on the scheduler's side: deciding, writing, reading back.

    python -m benchmarks.step_cost

The runtime of one rank, with the demo model's profile and no model: host time only. Writes
``step_cost.json``: rows ``{"case", "us_p50", "us_p99"}``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks._common import write_result
from sere_sglang.config_check import checked, resolved
from sere_sglang.ops import COUNTER_FIELDS, LayerTable
from sere_sglang.options import SereConfig
from sere_sglang.profile import load_profile
from sere_sglang.runtime.bind import Binding
from sere_sglang.runtime.control import ControlBlock
from sere_sglang.runtime.counters import FIELDS
from sere_sglang.runtime.rank import SereRuntime
from sere_sglang.runtime.service import Service
from sere_sglang.runtime.stage import RerouteStage, Switch
from sere_sglang.schedule.auto_rule import choose_rule
from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.cost import MoeCost

PROFILE = Path(__file__).resolve().parents[1] / "demo_model" / "sere_profile.safetensors"
LAYERS, TOP_K, STEPS = 48, 6, 20_000


def runtime(**options: object) -> SereRuntime:
    """A rank that measures, as tensor-parallel rank 0 does, with 48 layers."""
    config = resolved(checked(SereConfig(moe_backend="sere", **options)), top_k=TOP_K)  # type: ignore[arg-type]
    profile = load_profile(PROFILE)
    table = LayerTable(profile.similarity[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    control = ControlBlock(device, range(LAYERS), 8192)
    counters = torch.zeros(LAYERS, len(FIELDS), dtype=torch.int64, device=device)
    switch = Switch()
    stages = [
        RerouteStage(
            i,
            TOP_K,
            table,
            control.words[i],
            control.row_class,
            counters[i, : len(COUNTER_FIELDS)],
            switch,
        )
        for i in range(LAYERS)
    ]
    cost = MoeCost.from_bandwidth(
        expert_ms=0.01, slot_ms=1e-5, num_layers=LAYERS, num_experts=48, top_k=TOP_K
    )
    binding = Binding("none", stages, control, counters, switch, "none", choose_rule(profile))
    made = SereRuntime(config, binding, profile, cost)
    made.note_captured()  # what it runs are replays of graphs
    made.serve(Service(queue=lambda: (64, 0), measures=True))
    return made


def measure(made: SereRuntime, *, mixed: bool = False) -> np.ndarray:
    """Microseconds of each step; the number of rows drifts, as requests come and go."""
    rows = np.clip(64 + np.cumsum(np.random.default_rng(0).integers(-1, 2, STEPS)), 1, 256)
    took = np.empty(STEPS)
    for i, n in enumerate(rows.tolist()):
        composition = BatchComposition("decode", decode_tokens=n, padded_rows=n, running=n)
        classes = [j % 3 for j in range(n)] if mixed else [0] * n
        started = time.perf_counter_ns()
        made.begin_forward(composition, classes)
        made.end_forward()
        feedback = made.measuring.take_feedback()
        if feedback is not None:
            made.set_feedback(feedback)
        took[i] = (time.perf_counter_ns() - started) / 1000
    return took[STEPS // 10 :]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    off = runtime(sere_policy="static")
    off.prepared({"enabled": False})()
    cases = {
        "off": (off, False),
        "static": (runtime(sere_policy="static"), False),
        "adaptive": (runtime(sere_policy="adaptive"), False),
        "adaptive, mixed qualities": (runtime(sere_policy="adaptive"), True),
        "slo": (runtime(sere_policy="slo", sere_tpot_slo_ms=0.05), False),
    }
    rows = []
    print(f"{'case':28} {'p50 us':>8} {'p99 us':>8}")
    for name, (made, mixed) in cases.items():
        took = measure(made, mixed=mixed)
        p50, p99 = (float(np.percentile(took, q)) for q in (50, 99))
        rows.append({"case": name, "us_p50": p50, "us_p99": p99})
        print(f"{name:28} {p50:8.1f} {p99:8.1f}")
    print(f"wrote {write_result('step_cost', rows, layers=LAYERS)}")


if __name__ == "__main__":
    main()
