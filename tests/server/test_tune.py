"""``sere-sglang tune`` against a real server, and a server that uses what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sere_sglang.cli.borrowed import FILE, settings_borrowed
from sere_sglang.cli.main import app
from sere_sglang.cli.served import FORCING_FLAG
from sere_sglang.errors import SereError
from sere_sglang.profile import load_profile
from sere_sglang.schedule.settings import Settings
from tests.server.cost_files import write_cost
from tests.server.harness import Server, serve
from tests.server.profiles import write_profile

PROMPTS = [f"request number {i} " * (1 + i % 3) for i in range(8)]
ROWS = [{"batch": 2, "budget": 0.0}, {"batch": 8, "budget": 1.0}]


@pytest.fixture(scope="module")
def server(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """With a profile that says: two rows exact, eight as hard as it gets."""
    from sere_sglang.schedule.cost import StepModel

    folder = tmp_path_factory.mktemp("tuned")
    model = checkpoint("qwen3_moe")
    profile = write_tuned(write_profile(model, folder / "profile.safetensors"))
    cost = write_cost(model, folder / "cost.json", step=StepModel())
    flags = ("--moe-backend=sere", "--sere-rule=similarity", f"--sere-profile={profile}",
             f"--sere-cost={cost}", FORCING_FLAG, "--sere-min-gain=0")  # fmt: skip
    with serve(model, folder / "log", *flags, whole_batches=False) as server:
        yield server


def write_tuned(path: Path) -> Path:
    import dataclasses

    from sere_sglang.profile import save_profile

    profile = load_profile(path)
    tuning = {"rules": {"similarity": {"rows": ROWS}}}
    metadata = dataclasses.replace(profile.metadata, tuning=tuning)
    save_profile(dataclasses.replace(profile, metadata=metadata), path)
    return path


def test_adaptive_takes_the_budget_of_the_batch(server: Server) -> None:
    info = server.get("/server_info")
    assert info["sere"]["tuning"] == {"similarity": ROWS} and server.sere()["tuned"]
    for rows, budget in ((8, 1.0), (2, 0.0)):
        server.set_sere(reset_counters=True, min_batch=1)
        server.generate(PROMPTS[:rows], 40)
        state = server.sere()
        assert state["budget"] == budget and state["operating_point"]["enabled"] == (budget > 0)
    server.set_sere(tuned=False)
    server.generate(PROMPTS, 4)
    assert server.sere()["budget"] == server.sere()["quality_budget"] == 0.02
    server.set_sere(tuned=True)
    server.set_sere(quality_budget=0.3)
    server.generate(PROMPTS, 4)
    assert not server.sere()["tuned"] and server.sere()["budget"] == 0.3
    server.set_sere(tuned=True, quality_budget=0.02)


def test_tune_writes_a_table_and_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    before = server.sere()
    out = tmp_path / "tuned.safetensors"

    def tune(*more: str) -> dict[str, Any]:
        command = ["tune", f"--url={server.url}", f"--out={tmp_path}", f"--profile-out={out}"]
        done = CliRunner().invoke(app, [*command, "--sequences=4", *more])
        assert done.exit_code == 0, done.output
        assert "default 0.02: KL" in done.output and "wrote the table into" in done.output
        return json.loads((tmp_path / "tune.json").read_text())

    found = tune("--budget-kl=0.01", "--rounds=1", "--batch=4,8")
    cells = (tmp_path / "cells.jsonl").read_text()
    written = load_profile(out)
    rows = written.metadata.tuning["rules"]["similarity"]["rows"]
    assert [row["batch"] for row in rows] == [4, 8] and written.metadata.format_version == "1.3"
    for row, each in zip(rows, found["batches"], strict=True):
        assert each["default_over_exact"][0] > 0 and each["tuned_over_exact"][0] > 0
        if each["holds"]:
            assert row["budget"] == each["chosen"]["budget"] and row["kl"] <= 0.01
        else:
            assert row["budget"] == 0.0
    page = (tmp_path / "tune.html").read_text()
    assert page.count("<svg") == 2 and "default 0.02" in page

    # Cut short by a kill: what is there is not measured again, the rest is, to the same table.
    first = out.read_bytes()
    lines = cells.splitlines(keepends=True)
    (tmp_path / "cells.jsonl").write_text("".join(lines[:-3]) + lines[-3][:40])
    again = tune("--budget-kl=0.01", "--rounds=0", "--batch=4,8")
    assert [r["kl"] for b in again["batches"] for r in b["rows"]] == pytest.approx(
        [r["kl"] for b in found["batches"] for r in b["rows"]], rel=0.05, abs=1e-5
    )
    assert load_profile(out).tuning == _read(first, tmp_path).tuning

    faster = tune("--target-speedup=1.05", "--rounds=0", "--batch=8")
    for each in faster["batches"]:
        assert not each["holds"] or each["chosen"]["speedup"] >= 1.05
    after = server.sere()
    for name in ("enabled", "policy", "rule", "quality_budget", "tuned", "min_gain"):
        assert after[name] == before[name]


def test_settings_come_back_after_a_kill(server: Server, tmp_path: Path) -> None:
    before = server.sere()
    killed = settings_borrowed(server, tmp_path)
    killed.__enter__()
    server.set_sere(primary_k=1, min_batch=7)  # and that is its end
    assert json.loads((tmp_path / FILE).read_text())["url"] == server.url
    with settings_borrowed(server, tmp_path):
        assert _settings(server.sere()) == _settings(before)
        server.set_sere(primary_k=2, min_batch=5)
    assert _settings(server.sere()) == _settings(before) and not (tmp_path / FILE).exists()

    (tmp_path / FILE).write_text('{"url": "http://elsewhere:1", "settings": {"primary_k": 1}}')
    with settings_borrowed(server, tmp_path):  # of another server
        assert _settings(server.sere()) == _settings(before)
    (tmp_path / FILE).write_text('{"url": "http://localhost:1"')
    refused = pytest.raises(SereError, match=r"cannot be put back .*; delete the file")
    with refused, settings_borrowed(server, tmp_path):
        pass


def _settings(state: dict[str, Any]) -> Settings:
    return Settings.from_state(state)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget-kl=0.1", "--target-speedup=2"], "aim at one of the two"),
        (["--budget-kl=0"], "--budget-kl 0: give more than 0"),
        (["--target-speedup=1"], "--target-speedup 1: give more than 1"),
        (["--rule=best"], "--rule 'best': choose from"),
        (["--profile-out=/proc/nowhere/p"], "name a file by --profile-out"),
    ],
)
def test_what_tune_refuses(server: Server, arguments: list[str], said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["tune", f"--url={server.url}", f"--out={tmp_path}", *arguments])
    assert done.exit_code == 2 and said in " ".join(done.output.split())


def _read(content: bytes, folder: Path) -> Any:
    path = folder / "first.safetensors"
    path.write_bytes(content)
    return load_profile(path)
