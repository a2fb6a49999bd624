"""Writes docs/coverage.md from the results of ``python -m benchmarks.coverage``.

    python -m tools.coverage_page

What no server has reached stands in `NOT_RUN`, with how far it was followed instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "coverage.md"
HOW_FAR = {
    "passed": "**CPU server**",
    "refused": "refused at start",
    "failed": "**fails**",
    "not here": "plain SGLang does not run it on this CPU engine",
}
NOT_RUN = (
    (
        "NVIDIA GPU, Triton runner, CUDA graphs",
        "compiled for sm_80, sm_90a and sm_100; Triton kernels in the interpreter, CUDA kernels in "
        "an emulator",
        "`launch/gpu_check.sh` runs them",
    ),
    ("marlin, cutlass runners", "read", "rows may repeat an expert, as the paper makes them"),
    (
        "deep_gemm runner",
        "layer: its masked layout in the interpreter, on re-routed rows",
        "rows are made distinct; repeated, they run into the next expert's rows",
    ),
    ("flashinfer_cutlass runner", "read", "rows are made distinct"),
    (
        "flashinfer_trtllm and others that route in their kernel",
        "SGLang's own resolution of flags, for seven models on four GPUs",
        "another runner is taken, or the start refused with advice: [MoE runners](runners.md)",
    ),
    (
        "routers of a GPU: softmax, sigmoid, sqrtsoftplus, grouped, biased, scaled, with a shared "
        "expert, a model's own",
        "layer: SGLang's `select_experts`, its Triton router in the interpreter, 19 of them; not "
        "FlashInfer's `fused_topk_deepseek`",
        "what a router chose is re-routed, shared experts stay, weights and scores fit",
    ),
    (
        "DeepEP",
        "layer: SGLang's permutation of a rank's rows in the interpreter; what DeepEP's CUDA "
        "counts, by its definition; its transport read",
        "rows are made distinct, so that each slot has a place; no quality per request",
    ),
    (
        "Mooncake, NIXL, PPLX, MoRI and other all-to-all",
        "not readable",
        "refused at start without `--sere-allow-untested`",
    ),
    (
        "EPLB, redundant experts",
        "layer: SGLang's placement and its dispatch, static and dynamic; LPLB read",
        "logical ids are re-routed before they are placed",
    ),
    (
        "EAGLE, MTP",
        "read: SGLang's drafting has no attention for a CPU without AMX; verify batches are those "
        "of n-gram speculation, which is run",
        "the draft model is left alone, verify batches are re-routed",
    ),
    ("AMD", "read", "the Triton kernels"),
)

HEAD = """# Coverage
What was run with re-routing, and how far; made by `python -m tools.coverage_page` from what
`python -m benchmarks.coverage` saw. A CPU server: SGLang's own processes on its CPU engine, the
demo model over HTTP, beside the same server without the flag; answers with SERE switched off are
plain SGLang's up to ties, and with it on layers load fewer experts (active experts before -> after,
a mean over layers, of 4 prompts at S=1). What SGLang's CPU engine lacks without its own build of
sgl_kernel, both servers get from this plugin: trees of drafts and their attention, a MoE that
passes over other ranks' experts, LoRA and a host pool without pinned memory (`patches/cpu_*`).
A layer: SGLang's own functions and kernels around our stage, in the tests
(`tests/server/test_router_families.py`, `test_expert_layouts.py`).

"""


def main() -> None:
    PAGE.write_text(page())


def page() -> str:
    parts = [HEAD]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/coverage.json")):
        rows = json.loads(path.read_text())["rows"]
        parts.append(f"## Run on {path.parent.name}\n")
        parts.append("| configuration | how far | what was seen | run |\n|---|---|---|---|\n")
        parts += [*map(_row, rows), "\n"]
    parts.append("## Not run in a server\n| configuration | how far | so |\n|---|---|---|\n")
    parts += [f"| {what} | {how_far} | {so} |\n" for what, how_far, so in NOT_RUN]
    return "".join(parts)


def _row(row: dict[str, Any]) -> str:
    flags = "".join(f" `{flag}`" for flag in row["flags"])
    seen = row["why"].replace("|", "\\|").replace("<", "&lt;")
    return (
        f"| {row['configuration']}{flags} | {HOW_FAR[row['result']]} | {seen} "
        f"| {row['date']}, {row['commit']} |\n"
    )


if __name__ == "__main__":
    main()
