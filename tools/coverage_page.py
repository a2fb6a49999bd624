"""Writes docs/coverage.md from the results of ``python -m benchmarks.coverage``.

    python -m tools.coverage_page

What no run has reached stands in `NOT_RUN`, with how far it was followed instead.
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
    ("deep_gemm, flashinfer_cutlass runners", "read", "rows are made distinct"),
    (
        "flashinfer_trtllm and others that route in their kernel",
        "SGLang's own resolution of flags, for seven models on four GPUs",
        "another runner is taken, or the start refused with advice: [MoE runners](runners.md)",
    ),
    ("DeepEP", "read", "rows are made distinct; no quality per request"),
    (
        "Mooncake, NIXL, PPLX, MoRI and other all-to-all",
        "not readable",
        "refused at start without `--sere-allow-untested`",
    ),
    ("EPLB, redundant experts", "read", "logical ids are re-routed before they are placed"),
    ("EAGLE, MTP", "read", "the draft model is left alone, verify batches are re-routed"),
    (
        "DeepEP layouts, EPLB's placement of experts",
        "read",
        "re-routing comes before both, on logical ids",
    ),
    ("AMD", "read", "the Triton kernels"),
)

HEAD = """# Coverage
What was run with re-routing, and how far; made by `python -m tools.coverage_page` from what
`python -m benchmarks.coverage` saw. A CPU server: SGLang's own processes on its CPU engine, the
demo model over HTTP, beside the same server without the flag; answers with SERE switched off are
plain SGLang's up to ties, and with it on layers load fewer experts (active experts before -> after,
a mean over layers, of 4 prompts at S=1).

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
    parts.append("## Not run\n| configuration | how far | so |\n|---|---|---|\n")
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
