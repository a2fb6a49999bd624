"""How much text, and whose, surrogates need: rule energy's quality by what it was calibrated on.

    python -m benchmarks.calibration_text            the demo model, about a quarter of an hour

Profiles of the whole calibration text, of a quarter and of a sixteenth of it, and of its first
four domains alone, each judged like `benchmarks.quality` at one batch size: on all held-out texts,
and on those of the three domains that the last one has not seen. Beside them: energy without
surrogates, and SERE's rule. Writes ``calibration_text.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks._common import write_result
from benchmarks.serving.calibrated import calibrated, own_text
from benchmarks.serving.equal_bytes import compared, print_compared
from benchmarks.serving.experiment import IMPORTS_CHECKOUT, heldout_prompts
from benchmarks.serving.rule_points import AUTO, ENERGY, SIMILARITY, ForcedBatches, curve
from sere_sglang.measure import forcing
from sere_sglang.measure.server import serve
from sere_sglang.measure.weight import Weigher
from sere_sglang.profile import MoeModelInfo

MODEL = Path(__file__).resolve().parents[1] / "demo_model"
SEEN = ("scripture", "jargon", "python-manual", "python-code")
TOKENS = 65536
SHARES = (0.4, 0.6, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="decode batch")
    parser.add_argument("--folder", type=Path, default=MODEL.parent / "out" / "calibration_text")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    texts = heldout_prompts(MODEL)
    new = [i for i, domain in enumerate(_domains()) if domain not in SEEN]
    walked: ForcedBatches | None = None
    found: dict[str, list[dict[str, Any]]] = {}
    for name, profile in _profiles(folder):
        flags = ["--moe-backend=sere", f"--sere-profile={profile}", "--chunked-prefill-size=16384"]
        with serve(
            MODEL, folder / "server.log", *flags, forcing.SERVER_FLAG, env=IMPORTS_CHECKOUT
        ) as server:
            weigh = Weigher(server, MoeModelInfo.from_folder(str(MODEL)).num_experts)
            if walked is None:
                walked = ForcedBatches(weigh, texts, asked.batch, seed=0)
                for rule in (SIMILARITY, ENERGY):
                    found[rule] = list(walked.measured(weigh, rule))
            found[name] = list(walked.measured(weigh, AUTO))
    curves = {name: curve(rows) for name, rows in found.items()}
    of_new = {name: replace(own, kl=own.kl[:, new]) for name, own in curves.items()}
    rows = [
        {"texts": which, "profile": row.pop("rule"), **row}
        for which, own in (("all", curves), ("unseen domains", of_new))
        for row in compared(own, f"{TOKENS} tokens")
        if row["share"] in SHARES
    ]
    print("KL to exact routing at equal bytes; beside it over that of the whole text's profile")
    print_compared(rows, "texts", "profile")
    print(f"wrote {write_result('calibration_text', rows, batch=asked.batch, seen=SEEN)}")


def _domains() -> list[str]:
    lines = (MODEL / "data" / "heldout_prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["domain"] for line in lines]


def _profiles(folder: Path) -> Iterator[tuple[str, Path]]:
    """The whole text's first: all are compared with it."""
    whole = own_text(MODEL)
    assert whole is not None
    for tokens in (TOKENS, TOKENS // 4, TOKENS // 16):
        out = folder / f"{tokens}.safetensors"
        yield f"{tokens} tokens", calibrated(MODEL, out, whole, tokens=tokens)
    # The domains lie one after another and are equally long.
    text = whole.read_text()
    part = folder / "seen.txt"
    part.write_text(text[: len(text) * len(SEEN) // len(set(_domains()))])
    out = folder / "seen.safetensors"
    yield "four domains", calibrated(MODEL, out, part, tokens=TOKENS // 2)


if __name__ == "__main__":
    main()
