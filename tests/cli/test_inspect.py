"""``sere-sglang inspect``, and the figures that it prints."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from sere_sglang.profile import report as reports
from sere_sglang.profile import save_profile
from tests.cli.command import run
from tests.cli.made_profile import a_profile


def test_inspect_prints_plots_and_compares(tmp_path: Path) -> None:
    a, b = tmp_path / "sere_profile.safetensors", tmp_path / "b.safetensors"
    save_profile(a_profile(0), a)
    save_profile(a_profile(1), b)
    picture = tmp_path / "a.png"
    code, output = run("inspect", str(tmp_path), "--plot", str(picture), "--compare", str(b))
    assert code == 0, output
    assert "a/model" in output and "best substitute differs" in output and "cka-rbf" in output
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000

    code, output = run("inspect", str(a), "--compare", str(b), "--json")
    facts = json.loads(output)
    assert [layer["layer"] for layer in facts["layers"]] == [0, 3]
    profile = a_profile(0)
    best = reports.best_similarity(profile.similarity[3])
    assert facts["layers"][1]["critical"][0] == int(best.argmin())
    assert facts["layers"][1]["replaceable"][0] == int(best.argmax())
    # The table is a copy of the leading similarity.
    assert facts["measures"]["cka-rbf"][0]["rank_correlation"] == pytest.approx(1)
    assert facts["measures"]["cka-rbf"][0]["best_substitute_differs"] == 0
    assert abs(facts["compare"][0]["rank_correlation"]) < 0.9


def test_inspect_prints_names_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "[bold]:bug:\x1b[31m"
    folder.mkdir()
    made = a_profile()
    metadata = dataclasses.replace(made.metadata, model="[bold]x[/bold][/]\x1b[2J", data="[/a]\n")
    path = folder / "[/].safetensors"
    save_profile(dataclasses.replace(made, metadata=metadata), path)
    code, output = run("inspect", str(path), "--compare", str(path))
    assert code == 0, output
    assert "[bold]x[/bold][/]\\x1b[2J (" in output and "[/a]\\n, " in output
    assert output.count("[bold]:bug:\\x1b[31m/[/].safetensors") == 2 and "\x1b" not in output


def test_inspect_of_one_expert(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    made = a_profile(experts=1)
    for tables in made.tables.values():
        del tables["popularity"], tables["popularity_by_rank"]
    metadata = dataclasses.replace(made.metadata, top_k=1)
    save_profile(dataclasses.replace(made, metadata=metadata), path)
    code, output = run("inspect", str(path), "--compare", str(path))
    assert code == 0 and "1 experts" in output, output
    facts = json.loads(run("inspect", str(path), "--json")[1])["layers"][0]
    assert math.isnan(facts["lowest"]) and facts["critical"] == facts["replaceable"] == []
    code, output = run("inspect", str(path), "--plot", "x.png")
    assert code == 2 and "--plot x.png: one expert has no pairs to draw" in output


def test_rank_correlation_with_nothing_to_rank() -> None:
    flat = torch.full((4, 4), 0.5)
    assert math.isnan(reports.rank_correlation(flat, a_profile(0, experts=4).similarity[0]))


def test_expected_active_experts_against_simulation() -> None:
    """Independent tokens drawn with the stored popularity by rank."""
    experts, top_k, tokens, batch = 12, 3, 4000, 8
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(experts, generator=generator)
    noise = -torch.empty(tokens, experts).exponential_(generator=generator).log()
    ids = (logits + noise).topk(top_k).indices  # [T, K], ranked
    by_rank = torch.stack([ids[:, r].bincount(minlength=experts) for r in range(top_k)])
    for primary_k in (1, 2, 3):
        picked = torch.randint(tokens, (3000, batch), generator=generator)
        used = ids[picked][:, :, :primary_k].flatten(1)
        simulated = sum(len(row.unique()) for row in used) / len(used)
        expected = reports.expected_active(by_rank, tokens, primary_k, batch)
        assert expected == pytest.approx(simulated, rel=0.03)


def test_inspect_refuses_by_name(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_profile(a_profile(), path)
    assert "this profile holds frobenius, cka-rbf" in run("inspect", str(path), "--measure", "x")[1]
    assert "end the name in .png" in run("inspect", str(path), "--plot", "x.doc")[1]
    code, output = run("inspect", str(tmp_path / "none"))
    assert code == 2 and "no such file" in output


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    path = tmp_path / "p.safetensors"
    save_profile(a_profile(), path)
    assert run("inspect", str(path))[0] == 0
    code, output = run("inspect", str(path), "--plot", "x.png")
    assert code == 2 and "pip install 'sere-sglang[plot]'" in output
