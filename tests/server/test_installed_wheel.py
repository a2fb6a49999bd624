"""The wheel, installed into an environment of its own, serves away from the checkout."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from sere_sglang.measure.server import serve, start_process
from tests.packaging.dist import build
from tests.server.harness import SERE

BARE = {"PYTHONPATH": ""}  # whoever runs the tests may have the checkout there


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with nothing of ours but the wheel. SGLang's packages, gigabytes, are lent
    by the one that runs the tests; its editable install is not: that hangs on .pth files, which
    Python reads in an environment's own folder only."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = build(folder).glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    site = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    install = [*pip, "--no-deps", "--no-compile", f"--target={site}", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "venv" / "bin" / "python"


def test_serves(checkpoint: Callable[[str], Path], python: Path, tmp_path: Path) -> None:
    where = [str(python), "-c", "import sere_sglang; print(sere_sglang.__file__)"]
    told = subprocess.run(
        where, cwd=tmp_path, env={**os.environ, **BARE}, capture_output=True, text=True, check=True
    )
    assert Path(told.stdout.strip()).is_relative_to(python.parents[1])

    launcher = (str(python), "-m", "sglang.launch_server")
    model, log = checkpoint("qwen3_moe"), tmp_path / "server.log"
    start = functools.partial(start_process, cwd=tmp_path)
    with serve(model, log, *SERE, launcher=launcher, env=BARE, start=start) as server:
        texts = [answer["text"] for answer in server.generate(["a b c", "d e f", "g h i"], 8)]
        state = server.sere()
    assert len(texts) == 3 and state["operating_point"]["enabled"]
    assert sum(layer["rerouted"] for layer in state["counters"].values()) > 0
