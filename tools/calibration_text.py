"""Writes sere_sglang/calibration/calibration.txt, what `sere-sglang calibrate` uses without --data.

Two public-domain sources of the demo model's corpus, verse and a technical manual, a piece of
each document so that many documents fit.

usage: python -m tools.calibration_text CORPUS_FOLDER
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from tools.train_demo.corpus import build

SHARES = {"scripture": 45_000, "sqlite-manual": 75_000}  # bytes
EXCERPT = 1_500
TARGET = Path(__file__).parents[1] / "sere_sglang" / "calibration" / "calibration.txt"


def main() -> None:
    domains = build(Path(sys.argv[1]))["train"]
    chooser = random.Random(0)
    excerpts: list[str] = []
    for name, share in SHARES.items():
        prose = [text for text in map(_excerpt, domains[name]) if _is_prose(text)]
        excerpts += chooser.sample(prose, share // EXCERPT)
    chooser.shuffle(excerpts)
    TARGET.write_text("\n\n".join(excerpts) + "\n")


def _excerpt(document: str) -> str:
    """From a document's middle, in whole lines, without blank ones."""
    begin = max(0, (len(document) - EXCERPT) // 2)
    lines = document[begin : begin + EXCERPT].splitlines()[1:-1]
    return "\n".join(line.strip() for line in lines if line.strip())


def _is_prose(text: str) -> bool:
    return len(text) > EXCERPT // 2 and text.count(". ") + text.count("; ") >= len(text) // 250


if __name__ == "__main__":
    main()
