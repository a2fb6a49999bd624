"""The tables that compare the rules: read, checked, reported; old profiles have none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from sere_sglang.profile import RULES_VERSION, ProfileError, SereProfile, load_profile, save_profile
from sere_sglang.profile.rule_errors import CANDIDATES, RULE_CHECKS, UNFITTED, energy_weights
from sere_sglang.profile.rule_report import rule_reports
from tests.profile.samples import METADATA, a_profile

TABLES = {
    "error_batch": torch.tensor([8, 32]),
    "error_active": torch.tensor([0.25, 0.5]),
    "error_similarity": torch.tensor([0.4, 0.1]),
    "error_piggyback": torch.tensor([0.3, 0.05]),
    "error_budget": torch.tensor([0.3, 0.07]),
    "error_energy": torch.tensor([0.2, 0.02]),
    "error_surrogates": torch.tensor([0.1, 0.01]),
    "energy_weights": torch.tensor([0.125, 0.25, 0.9]),
}


def _compared() -> SereProfile:
    profile = a_profile((0, 2))
    profile.metadata = dataclasses.replace(METADATA, format_version=RULES_VERSION)
    for tables in profile.tables.values():
        tables |= {name: table.clone() for name, table in TABLES.items()}
    return profile


def test_they_are_all_known() -> None:
    assert TABLES.keys() == RULE_CHECKS.keys()


def test_they_come_back_and_say_which_rule_errs_least(tmp_path: Path) -> None:
    save_profile(_compared(), tmp_path / "p")
    loaded = load_profile(tmp_path / "p")
    assert all(loaded.tables[2][name].equal(table) for name, table in TABLES.items())
    assert loaded.metadata.format_version == "1.4"
    assert next(iter(loaded.rule_errors)) == CANDIDATES[-1]
    assert energy_weights(loaded.tables[0]) == pytest.approx((0.125, 0.25, 0.9))
    reports = rule_reports(loaded)
    assert [report.layer for report in reports] == [0, 2]
    assert next(iter(reports[0].errors)) == "energy with surrogates"
    assert reports[0].errors["similarity"] == pytest.approx(0.2)
    assert (reports[0].fill, reports[0].renormalize) == (0.125, 0.25)


def test_an_older_profile_is_served_with_the_constants(tmp_path: Path) -> None:
    save_profile(a_profile(), tmp_path / "p")
    loaded = load_profile(tmp_path / "p")
    assert loaded.rule_errors == {} and rule_reports(loaded) == []
    assert {energy_weights(tables) for tables in loaded.tables.values()} == {UNFITTED}
    assert UNFITTED == (0.5, 0.25, 1.0)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        *((name, value, "holds") for name in TABLES if name != "error_batch"
          for value in ("nan", "inf", "-0.1")),
        *((name, "1.5", "outside [0, 1]") for name in ("error_active", "energy_weights")),
        ("error_batch", "0", "outside [1, "),
        *((name, "double", "expected") for name in TABLES),
        *((name, "square", "expected [") for name in TABLES),
        *((name, "short", "of 1 cells, error_batch of 2") for name in TABLES if name[:6] == "error_"
          and name != "error_batch"),
        ("error_batch", "short", "of 2 cells, error_batch of 1"),
        ("energy_weights", "short", "expected [3]"),
        *((name, "gone", "has error_") for name in ("error_batch", "error_active",
                                                     "error_similarity")),
    ],
)  # fmt: skip
def test_an_impossible_table_is_refused_by_name(
    tmp_path: Path, name: str, change: str, said: str
) -> None:
    profile, path = _compared(), tmp_path / "p"
    table = profile.tables[2].pop(name)
    if change == "short":
        table = table[:-1]
    elif change == "double":
        table = table.double()
    elif change == "square":
        table = table[None].expand(2, -1)
    elif change != "gone":
        table[0] = float(change)
    if change != "gone":
        profile.tables[2][name] = table
    save_profile(profile, path)
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    assert f"{path}: layers.2" in str(error.value) and "calibrate again" in str(error.value)
    assert said in str(error.value) and (name in str(error.value) or change == "short")


@pytest.mark.parametrize("name", ["error_piggyback", "error_budget", "error_energy",
                                  "error_surrogates", "energy_weights"])  # fmt: skip
def test_what_could_not_be_measured_may_be_missing(tmp_path: Path, name: str) -> None:
    profile = _compared()
    del profile.tables[0][name]
    save_profile(profile, tmp_path / "p")
    loaded = load_profile(tmp_path / "p")
    assert all(candidate.table != name for candidate in loaded.rule_errors)
