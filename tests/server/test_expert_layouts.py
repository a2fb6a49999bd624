"""Where SGLang's dispatch kernels put slots behind re-routing, which is why rows stay distinct."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.server.harness import told_by

SCRIPT = Path(__file__).with_name("expert_layouts_script.py")
ROWS = 64  # of the script
EXACT = 1e-5


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return told_by(SCRIPT, TRITON_INTERPRET="1")


@pytest.mark.parametrize("rows", ["alike", "apart"])
def test_every_slot_has_a_place_with_its_expert(seen: dict[str, Any], rows: str) -> None:
    """deep_gemm's masked layout."""
    masked = seen[f"masked, {rows}, distinct"]
    assert masked["slots in another expert's rows"] == masked["slots that share a place"] == 0
    assert masked["most rows of an expert"] <= ROWS < masked["room"]
    assert masked["far"] < EXACT


def test_rows_as_the_paper_makes_them_run_into_the_next_expert(seen: dict[str, Any]) -> None:
    masked = seen["masked, alike, repeated"]
    assert masked["most rows of an expert"] > masked["room"]
    assert masked["slots in another expert's rows"] > 0


@pytest.mark.parametrize("rows", ["alike", "apart"])
def test_deepep_counts_what_it_sends(seen: dict[str, Any], rows: str) -> None:
    """Normal mode: a row of different experts is as many slots as DeepEP has counted for it."""
    normal = seen[f"normal, {rows}"]
    assert normal["experts whose rows were counted wrongly"] == 0
    assert normal["rows sent"] >= ROWS
    assert normal["far"] < EXACT


@pytest.mark.parametrize("rows", ["alike", "apart"])
def test_low_latency_has_room_for_every_row(seen: dict[str, Any], rows: str) -> None:
    """As many slots of an expert as a rank has rows, which SGLang bounds by the room; slots that
    repeat an expert would be more than that."""
    own = seen[f"low latency, {rows}, distinct"]
    assert own["most slots of an expert"] <= own["rows"] <= own["room"]
    repeated = seen[f"low latency, {rows}, repeated"]
    assert repeated["most slots of an expert"] > repeated["rows"]
