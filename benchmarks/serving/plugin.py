"""How a server that is started here loads a plugin of SGLang's that is not installed."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.serving.experiment import IMPORTS_CHECKOUT


def plugin_environment(site: Path, name: str, function: str) -> dict[str, str]:
    """Environment of a server whose processes call `function`, ``module:function`` of this
    checkout, when SGLang loads its plugins. site: a folder to announce it in, made here."""
    about = site / f"sere_{name}-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sere-{name}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {function}\n")
    return {"PYTHONPATH": os.pathsep.join([str(site), IMPORTS_CHECKOUT["PYTHONPATH"]])}
