"""Budgets that a profile was tuned to: as written, between two of them, and damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sere_sglang.errors import ProfileError
from sere_sglang.profile import load_profile, save_profile
from sere_sglang.profile.file import TUNED_VERSION
from sere_sglang.profile.tuning import UNTUNED, read_tuning
from tests.profile.samples import a_profile

ROWS = [{"batch": 4, "budget": 0.01, "kl": 0.012}, {"batch": 16, "budget": 0.03}]
ENTRY = {"rules": {"similarity": {"rows": ROWS, "about": {"text": "mine"}}}}


def test_a_profile_keeps_them(tmp_path: Path) -> None:
    plain = a_profile()
    metadata = dataclasses.replace(plain.metadata, tuning=ENTRY, format_version=TUNED_VERSION)
    save_profile(dataclasses.replace(plain, metadata=metadata), tmp_path / "tuned")
    save_profile(plain, tmp_path / "plain")
    tuned = load_profile(tmp_path / "tuned")
    assert tuned.metadata.tuning == ENTRY and tuned.metadata.format_version == "1.3"
    assert tuned.tuning.rows == {"similarity": ((4, 0.01), (16, 0.03))}
    assert load_profile(tmp_path / "plain").tuning == UNTUNED
    assert b"tuning" not in (tmp_path / "plain").read_bytes(), "written as before"


def test_between_two_rows_it_follows_the_logarithm() -> None:
    tuning = read_tuning("p", ENTRY)
    assert [tuning.budget("similarity", n) for n in (1, 4, 16, 4000)] == [0.01, 0.01, 0.03, 0.03]
    assert tuning.budget("similarity", 8) == pytest.approx(0.02)
    assert tuning.budget("energy", 8) is None and UNTUNED.budget("similarity", 8) is None


@pytest.mark.parametrize(
    "rules",
    [
        [],
        {"similarity": []},
        {"similarity": {"rows": []}},
        {"similarity": {"rows": [{"batch": 4}]}},
        {"similarity": {"rows": [{"batch": 0, "budget": 0.1}]}},
        {"similarity": {"rows": [{"batch": 4.0, "budget": 0.1}]}},
        {"similarity": {"rows": [{"batch": True, "budget": 0.1}]}},
        {"similarity": {"rows": [{"batch": 8, "budget": 0.1}, {"batch": 4, "budget": 0.1}]}},
        {"similarity": {"rows": [{"batch": 4, "budget": 1.5}]}},
        {"similarity": {"rows": [{"batch": 4, "budget": float("nan")}]}},
        {"similarity": {"rows": [{"batch": 4, "budget": "much"}]}},
        {"similarity": {"rows": [{"batch": 10**400, "budget": 0.1}]}},
        {"x" * 9000: {"rows": [7]}},
        {"similarity": {"rows": [{"batch": n, "budget": 0.1} for n in range(1, 70)]}},
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, rules: Any) -> None:
    plain = a_profile()
    metadata = dataclasses.replace(plain.metadata, tuning={"rules": rules})
    path = tmp_path / "wrong"
    save_profile(dataclasses.replace(plain, metadata=metadata), path)
    with pytest.raises(ProfileError) as refusal:
        load_profile(path)
    assert "tune again" in str(refusal.value) and len(str(refusal.value)) < 500
    assert json.dumps(rules)  # said nothing of JSON
