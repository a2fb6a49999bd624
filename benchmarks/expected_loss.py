"""Does the loss that policies expect stand for quality? Expected loss against measured KL.

    python -m benchmarks.expected_loss

Serves the demo model and decodes held-out text, teacher-forced, at many operating points and
batch sizes; then at what ``adaptive`` chooses for several budgets. Every point and batch size gives
one row: what the profile alone predicts (loss, active experts) and what was measured (KL, active
experts). Writes ``expected_loss.json``.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks._common import write_result
from benchmarks.serving.experiment import IMPORTS_CHECKOUT, heldout_prompts
from sere_sglang.measure import forcing
from sere_sglang.measure.divergence import mean_kl
from sere_sglang.measure.server import Server, serve
from sere_sglang.measure.texts import Text
from sere_sglang.profile import load_profile
from sere_sglang.schedule.expectation import Expectation, expect, statistics_of
from sere_sglang.schedule.point import described

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "demo_model"
BATCHES = (2, 4, 8, 16, 24, 32, 48)
BUDGETS = (0.005, 0.01, 0.02, 0.04)
STREAMS = 48  # measured at least, in as many batches as it takes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "expected_loss")
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    profile = MODEL / "sere_profile.safetensors"
    expected = expect(statistics_of(load_profile(profile)))
    texts = heldout_prompts(MODEL)
    flags = ["--moe-backend=sere", f"--sere-profile={profile}", "--chunked-prefill-size=16384"]
    rows = []
    with serve(
        MODEL, folder / "server.log", *flags, forcing.SERVER_FLAG, env=IMPORTS_CHECKOUT
    ) as server:
        server.set_sere(enabled=False)
        exact = {batch: _log_probs(server, texts, batch) for batch in BATCHES}
        for about, settings in _settings(expected):
            for batch in BATCHES:
                server.set_sere(
                    **{"enabled": True, "min_batch": 1, "reset_counters": True} | settings
                )
                seen = _log_probs(server, texts, batch)
                state = server.sere()
                point = described(state["operating_point"])
                active, loss = expected.effect(batch, point)
                rows.append(
                    {
                        **about,
                        "batch": batch,
                        "point": state["operating_point"]["name"],
                        "expected_loss": loss,
                        "kl": mean_kl(exact[batch], seen),
                        "expected_active": active / expected.num_layers,
                        "active": _active(state["counters"]) if point.enabled else None,
                    }
                )
            print(about, " ".join(f"{r['kl']:.4f}" for r in rows[-len(BATCHES) :]), flush=True)
    _print(rows)
    print(f"wrote {write_result('expected_loss', rows, model='demo model')}")


def _settings(expected: Expectation) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    thresholds = sorted({p.threshold for p in expected.points})[::2]
    for s in range(1, expected.top_k):
        for rho in thresholds:
            about = {"primary_k": s, "threshold": rho}
            yield about, {"policy": "static"} | about
    for budget in BUDGETS:
        about = {"quality_budget": budget}
        yield about, {"policy": "adaptive", "min_gain": 0.0} | about


def _log_probs(server: Server, texts: list[Text], batch: int) -> np.ndarray:
    own = [texts[i % len(texts)] for i in range(math.ceil(STREAMS / batch) * batch)]
    return forcing.forced_in_batches(server, own, batch)


def _active(counters: dict[str, dict[str, int]]) -> float:
    """Per layer and re-routed forward."""
    return statistics.fmean(
        layer["active_after"] / max(layer["forwards"], 1) for layer in counters.values()
    )


def _print(rows: list[dict[str, Any]]) -> None:
    for kind, key in (("every S and rho", "primary_k"), ("chosen by adaptive", "quality_budget")):
        own = [r for r in rows if key in r and r["expected_loss"] > 0]
        factor = [r["kl"] / r["expected_loss"] for r in own]
        low, middle, high = np.quantile(factor, (0.1, 0.5, 0.9))
        ranks = spearmanr([r["expected_loss"] for r in own], [r["kl"] for r in own])
        print(
            f"{kind}: {len(own)} rows, KL / expected loss {middle:.2f} in the median, 80 % of them "
            f"{low:.2f} to {high:.2f}; rank correlation {ranks.statistic:.3f}"
        )


if __name__ == "__main__":
    main()
