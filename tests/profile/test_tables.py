"""Every table of a profile is checked when it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sere_sglang.profile import ProfileError, load_profile, save_profile
from tests.profile.samples import a_matrix, a_profile


def _with(table: torch.Tensor, change: str) -> torch.Tensor:
    table = table.clone()
    if change == "zero":
        table[:] = 0
    elif change == "short":
        table = table[:-1].contiguous()
    elif change == "flat":
        table = table.flatten()
    elif change == "zero rank":
        table[1] = 0
    else:
        table = table if table.is_floating_point() else table.float()
        table.view(-1)[1] = float(change)
    return table


COUNTS = torch.tensor([[5, 1, 1, 1], [2, 2, 2, 2]])
TABLES = {
    "popularity": COUNTS.sum(0),
    "popularity_by_rank": COUNTS,
    "weight_by_rank": torch.tensor([0.7, 0.3]),
    "coactivation": COUNTS.T @ COUNTS,
    "similarity_cka": a_matrix(4, 5),
    "scale": a_matrix(4, 6) - 0.5,
}
BAD_TABLES = [
    *((name, change, said) for name in TABLES for change, said in (
        ("nan", "holds NaN"), ("inf", "holds infinity"), ("-inf", "holds infinity"),
        ("short", "ranks, |experts, |expected "), ("flat", "expected |experts, "),
    ) if (name, change) not in (("popularity", "flat"), ("weight_by_rank", "flat"))),
    *((name, "-1", "outside [0, ") for name in TABLES if name != "scale"),
    *((name, "zero", "0 throughout") for name in TABLES if "_by_rank" in name),
    ("popularity", "zero", "is 0 throughout"),
    ("popularity_by_rank", "zero rank", "rank 1, is 0 throughout"),
    ("popularity_by_rank", "9", "counts 16 tokens at rank 0 and 8 at rank 1"),
    ("popularity", "90", "not the sum over ranks"),
    ("weight_by_rank", "1e7", "outside [0, 1e+06]"),
    ("similarity_cka", "1.5", "outside [0, 1]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "said"), BAD_TABLES)
def test_an_impossible_table_is_refused_by_name(
    tmp_path: Path, name: str, change: str, said: str
) -> None:
    path = tmp_path / "p.safetensors"
    profile = a_profile((0, 2))
    profile.tables = {i: {n: t.clone() for n, t in TABLES.items()} for i in (0, 2)}
    save_profile(profile, path)
    assert load_profile(path).tables.keys() == {0, 2}
    profile.tables[2][name] = _with(TABLES[name], change)
    save_profile(profile, path)
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    message = str(error.value)
    assert f"{path}: layers.2.{name}" in message and "calibrate again" in message
    assert any(part in message for part in said.split("|")), message


@pytest.mark.parametrize(
    "table", [torch.ones(4, dtype=torch.bool), torch.ones(4, dtype=torch.float8_e4m3fn)]
)
def test_a_table_of_another_type_is_refused(tmp_path: Path, table: torch.Tensor) -> None:
    profile = a_profile()
    profile.tables[2]["popularity"] = table
    save_profile(profile, tmp_path / "p")
    with pytest.raises(ProfileError, match=r"layers\.2\.popularity is \w+; expected int64 or"):
        load_profile(tmp_path / "p")


def test_a_table_of_no_layer_is_refused(tmp_path: Path) -> None:
    profile = a_profile()
    profile.tables[7] = {"popularity": torch.ones(4)}
    save_profile(profile, tmp_path / "p")
    with pytest.raises(ProfileError, match="layer 7 has tables but no similarity"):
        load_profile(tmp_path / "p")
