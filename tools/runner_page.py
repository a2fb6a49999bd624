"""Writes docs/runners.md: which MoE runner a model gets, from SGLang's own resolution of its flags.

    python -m tools.runner_page

Each cell is a ``ServerArgs`` resolved on this machine with the platform facts of another
(``sglang.srt.runtime_context``): no GPU is asked. Models are config.json files alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from sere_sglang.errors import SereError
from sere_sglang.options import SereConfig
from sere_sglang.runtime.runner_choice import layer_runner
from sere_sglang.runtime.runners import DISPATCHERS, RUNNERS, Runner
from tools.markdown import table_row
from tools.runner_models import MODELS, QUANTIZATIONS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "runners.md"
ARCHITECTURES = {"Ampere": 80, "Hopper": 90, "Blackwell": 100, "RTX Blackwell": 120}

HEAD = """# MoE runners
Made by `python -m tools.runner_page`, which resolves SGLang's flags as a server does at its start,
with the platform of each GPU in place of this machine's. Nothing on this page was run on a GPU.

## What SGLang picks, and what we do
Where a cell has an arrow, SGLang picks a runner that routes inside its kernel, where nothing can be
re-routed, and `--moe-backend sere` takes the one behind the arrow, saying so in the log. A runner
that was asked for with `--moe-runner-backend` is never changed: if it routes inside its kernel, the
start is refused with the one behind the arrow as advice. "by scheme" is SGLang's `auto` down to the
layers of a compressed-tensors checkpoint, all of whose runners take standard top-k. No all-to-all,
driver below 595.

"""


class Cell(NamedTuple):
    """picked: by SGLang, down to the layer. served: under ``--moe-backend sere``; the refusal
    otherwise."""

    picked: str
    served: str


def main() -> None:
    PAGE.write_text(page())


def page() -> str:
    from sere_sglang.patches import moe_runner

    moe_runner.register()
    columns = [f"{name}, SM {sm}" for name, sm in ARCHITECTURES.items()]
    parts = [
        HEAD,
        table_row(["model", "weights", *columns]),
        table_row(["---"] * (2 + len(columns))),
    ]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        for model, (config, weights) in MODELS.items():
            for name in weights:
                checkpoint = Path(folder, f"{model} {name}")  # SGLang keeps what it read, by path
                checkpoint.mkdir()
                stated = QUANTIZATIONS[name]
                given = {**config, **({"quantization_config": stated} if stated else {})}
                (checkpoint / "config.json").write_text(json.dumps(given))
                cells = [_shown(cell(checkpoint, sm)) for sm in ARCHITECTURES.values()]
                parts.append(table_row([model, name, *cells]))
    parts.append(_capabilities())
    return "".join(parts)


def cell(checkpoint: Path, sm: int) -> Cell:
    """What a checkpoint gets on compute capability `sm`."""
    with platform(sm):
        try:
            picked = _runner(checkpoint, SereConfig(), sm)
        except (ValueError, AssertionError, NotImplementedError) as error:
            return Cell(f"SGLang refuses: {str(error).strip().splitlines()[0]}", "")
        try:
            return Cell(picked, _runner(checkpoint, SereConfig(moe_backend="sere"), sm))
        except SereError as error:
            return Cell(picked, f"refused: {error}")


def _runner(checkpoint: Path, asked: SereConfig, sm: int) -> str:
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import ServerArgs

    from sere_sglang import config
    from sere_sglang.patches import moe_runner

    record = ServerArgs(
        model_path=str(checkpoint),
        device="cuda",
        mem_fraction_static=0.8,
        skip_tokenizer_init=True,
    )
    config.attach(record, asked)
    record.resolve_once()
    if asked.enabled:
        moe_runner.require_known_runner(record, allow_untested=False)
    view = resolved_view(record)
    return layer_runner(view.moe_runner_backend, moe_runner.quantization_of(view), sm)


@contextlib.contextmanager
def platform(sm: int) -> Iterator[None]:
    """SGLang takes this machine for one with an NVIDIA GPU of compute capability `sm`."""
    from sglang.srt.layers import quantization
    from sglang.srt.layers.quantization import marlin_utils
    from sglang.srt.layers.quantization.awq import awq
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
    from sglang.srt.runtime_context import override_platform

    facts = {
        "is_cuda": True,
        "is_sm90": sm == 90,
        "is_sm100": sm == 100,
        "is_sm100_or_sm110": sm == 100,
        "is_sm110": False,
        "is_sm120": sm == 120,
        "is_blackwell": sm >= 100,
        "is_hopper_with_cuda_12_3": sm == 90,
        "has_amx": False,
        "has_flashinfer": True,
        "device_sm": sm,
        "device_capability": (sm // 10, sm % 10),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(override_platform(**facts))
        # Asked of the machine itself, some when they are imported.
        stack.enter_context(patch.object(awq, "_is_cuda", True))
        stack.enter_context(
            patch.object(marlin_utils, "get_device_capability", lambda: (sm // 10, sm % 10))
        )
        stack.enter_context(patch.dict(quantization.QUANTIZATION_METHODS, {"mxfp4": Mxfp4Config}))
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _shown(cell: Cell) -> str:
    picked, served = ("by scheme" if name == "auto" else name for name in cell)
    return picked if served in (picked, "") else f"{picked} → {served}"


def _capabilities() -> str:
    kinds = {
        "repeated": "may hold an expert twice",
        "distinct": "K different experts",
        "inside": "routes by itself: refused, or another is chosen",
        "unknown": "not known: refused without `--sere-allow-untested`",
    }

    def rows(table: dict[str, Any]) -> Iterator[str]:
        for name, part in table.items():
            assert isinstance(part, Runner)
            own = [getattr(part, "rows", None)] if table is DISPATCHERS else []
            yield table_row([f"`{name}`", kinds[part.ids], *own, part.skips_minus_one, part.read])

    return "".join(
        [
            "\n## What they make of rows\n",
            "From `sere_sglang/runtime/runners.py`, which decides by it. Rows are made distinct\n"
            "unless both may hold an expert twice; re-routing never writes -1.\n\n",
            table_row(["`--moe-runner-backend`", "rows", "skips -1", "read in"]),
            table_row(["---"] * 4),
            *rows(RUNNERS),
            "\n",
            table_row(["`--moe-a2a-backend`", "rows", "whose", "skips -1", "read in"]),
            table_row(["---"] * 5),
            *rows(DISPATCHERS),
        ]
    )


if __name__ == "__main__":
    main()
