"""patches/upstream: the patch applies to the installed SGLang, passes its own test, and is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sglang
import sglang.version

from sere_sglang.patches import TESTED_VERSIONS

ROOT = Path(__file__).resolve().parents[2]
PATCH = ROOT / "patches" / "upstream" / "topk_transform.patch"

# A layer's stage gets what a router chose, once, through the registered transform.
_USED = """
import torch
from types import SimpleNamespace
from sere_sglang.patches import topk
from sere_sglang.patches.guard import HOOKS
from sglang.srt.layers.moe import topk as theirs, topk_transform
before = theirs._post_process_topk_ids
topk.install()
assert theirs._post_process_topk_ids is before, "hooked although SGLang offers a way in"
assert topk_transform._transforms == [h for h in HOOKS if "_post_process_topk_ids" in h.name]
config = theirs.TopKConfig(top_k=2)
seen = []
def run(ids, weights, logits, own):
    seen.append((logits, own))
    ids.fill_(1)
config._sere_stage = SimpleNamespace(run=run)
logits = torch.zeros(3, 4)
ids, weights, _ = theirs._post_process_topk_ids(
    topk_ids=torch.zeros(3, 2, dtype=torch.int32), topk_weights=torch.ones(3, 2),
    topk_config=config, router_logits=logits, layer_id=0,
)
assert ids.tolist() == [[1, 1]] * 3 and len(seen) == 1
assert seen[0][0] is logits and seen[0][1] is config
print("used")
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed sources where SGLang's repository has them, patched."""
    root = tmp_path_factory.mktemp("upstream")
    shutil.copytree(
        Path(sglang.__path__[0]),
        root / "python" / "sglang",
        ignore=shutil.ignore_patterns("__pycache__", "*.so"),
    )
    for check in (["--check"], []):
        command = ["git", "apply", "-p1", *check, str(PATCH)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return root


def _run(tree: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(tree / "python"), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_it_is_against_the_tested_version() -> None:
    assert sglang.version.__version__ in TESTED_VERSIONS
    assert TESTED_VERSIONS[0] in (PATCH.parent / "README.md").read_text()


def test_its_own_unit_test_passes(tree: Path) -> None:
    (test,) = (tree / "test").rglob("test_*.py")
    assert "OK" in _run(tree, str(test))


def test_the_plugin_uses_it_where_it_is(tree: Path) -> None:
    assert "used" in _run(tree, "-c", _USED)
