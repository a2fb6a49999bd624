"""Writes docs/cookbook.md: commands for the models of launch/models/, and where they can gain.

    python -m tools.cookbook_page

Commands are what ``launch/model.sh NAME --dry-run`` prints. Shapes are those of the models'
config.json; the rest is arithmetic.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

from tools.markdown import table_row

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cookbook.md"
BATCHES = (4, 16, 64)

HEAD = """# Cookbook
Made by `python -m tools.cookbook_page` from `launch/models/`: each model's commands, as `bash
launch/model.sh NAME --dry-run` prints them. A test holds every flag to SGLang's parser. **None of
these models was run here**: this project has had no GPU yet. The first command runs once per
checkpoint, the second serves; then [`sere-sglang bench`](measuring.md) says whether it pays on
your machine, and [`tune`](guide.md) what each batch size may spend.

## Where it can gain
While a batch decodes, a layer reads the experts that its rows activate. If rows chose
independently and evenly, 4, 16 and 64 rows would activate so many as stand left of the arrow, and
each row's best one alone, which is what S = 1 leaves, so many as stand right of it. Real routing
is less even: fewer on both sides. What lies between is what re-routing can trade for quality;
times the bytes of an expert and the layers, it is what a step reads less. With eight experts of
which 16 rows' best ones are seven, there is nothing to trade.

"""


class Shape(NamedTuple):
    """Of one model: MoE layers, experts, experts per token, hidden and intermediate size, and bits
    of a weight."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    inter: int
    bits: float

    @property
    def expert_mb(self) -> float:
        return 3 * self.hidden * self.inter * self.bits / 8e6

    def active(self, rows: int, per_row: int) -> float:
        """Distinct experts of `rows` rows that choose `per_row` each, evenly and independently."""
        return self.experts * (1 - (1 - per_row / self.experts) ** rows)


SHAPES = {
    "qwen3-30b-a3b": Shape(48, 128, 8, 2048, 768, 16),
    "qwen3-235b-a22b": Shape(94, 128, 8, 4096, 1536, 16),
    "qwen1.5-moe-a2.7b": Shape(24, 60, 4, 2048, 1408, 16),
    "deepseek-v2-lite": Shape(26, 64, 6, 2048, 1408, 16),
    "deepseek-v3": Shape(58, 256, 8, 7168, 2048, 8),
    "glm-4.5-air": Shape(45, 128, 8, 4096, 1408, 8),
    "glm-4.5": Shape(89, 160, 8, 5120, 1536, 8),
    "gpt-oss-20b": Shape(24, 32, 4, 2880, 2880, 4.25),
    "gpt-oss-120b": Shape(36, 128, 4, 2880, 2880, 4.25),
    "mixtral-8x7b": Shape(32, 8, 2, 4096, 14336, 16),
}


def main() -> None:
    PAGE.write_text(page())


def page() -> str:
    rows = [f"{batch} rows" for batch in BATCHES]
    parts = [
        HEAD,
        table_row(["model", "MoE layers", "experts, per token", "an expert", *rows]),
        table_row(["---"] * (4 + len(rows))),
    ]
    for name, shape in SHAPES.items():
        counts = [
            f"{shape.active(batch, shape.top_k):.0f} → {shape.active(batch, 1):.0f}"
            for batch in BATCHES
        ]
        chosen = f"{shape.experts}, {shape.top_k}"
        parts.append(table_row([name, shape.layers, chosen, f"{shape.expert_mb:.1f} MB", *counts]))
    parts += [_section(name) for name in SHAPES]
    return "".join(parts)


def _section(name: str) -> str:
    first, *_ = (ROOT / "launch" / "models" / f"{name}.sh").read_text().splitlines()
    commands = subprocess.run(
        ["bash", ROOT / "launch" / "model.sh", name, "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin"},  # a MODEL or TP of the caller's would end up in the page
    ).stdout
    lines = "\n".join(line.rstrip() for line in commands.splitlines())
    title, _, needs = first.removeprefix("# ").partition(": ")
    return f"\n## {name}\n{title}: {needs}.\n\n```\n{lines}\n```\n"


if __name__ == "__main__":
    main()
