"""SGLang's routers as a GPU server has them, with our stage behind each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.server.harness import told_by

SCRIPT = Path(__file__).with_name("router_families_script.py")
SHARED, ROUTED = 32, 4  # of the script: the id behind its experts, and how many a row is routed to
FAMILIES = (
    "softmax",
    "softmax, not renormalized",
    "softmax, scaled",
    "softmax, in torch",
    "softmax, for flashinfer_trtllm_routed",
    "sigmoid, biased",
    "sigmoid, biased, scaled",
    "sigmoid, biased, a shared expert",
    "sqrtsoftplus, biased",
    "grouped softmax",
    "grouped softmax, not renormalized, scaled",
    "grouped softmax, a shared expert",
    "grouped sigmoid",
    "grouped, biased",
    "grouped, biased, scaled",
    "grouped, biased, a shared expert",
    "one group, biased",
    "a bias of each row",
    "a function of the model",
)
PLACED = tuple(
    f"{router}, {algorithm}"
    for router in ("softmax", "grouped, biased, a shared expert")
    for algorithm in ("static", "dynamic", "dynamic, as every rank")
)


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return told_by(SCRIPT, TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1")


def test_the_families_are_all_there(seen: dict[str, Any]) -> None:
    assert set(seen["families"]) == set(FAMILIES)
    assert set(seen["placed"]) == set(PLACED)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stage_is_handed_what_the_router_chose(seen: dict[str, Any], name: str) -> None:
    router = seen["families"][name]
    assert router["seen"] == router["plain"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layer_gets_re_routed_slots(seen: dict[str, Any], name: str) -> None:
    router = seen["families"][name]
    assert router["moved"] > 0
    ids, weights = router["out"]
    assert [ids, weights] == router["wanted"]
    assert all(len(set(row)) == len(row) for row in ids), "an expert twice in a row"
    for before, after in zip(router["plain"][1], weights, strict=True):
        assert sum(after) == pytest.approx(sum(before), rel=1e-5), "weight was lost"
    if "shared" in name:
        assert {row[-1] for row in ids} == {SHARED}, "shared experts stay where they are"


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_what_the_routers_weights_were_made_of(seen: dict[str, Any], name: str) -> None:
    """In a row, each slot's weight is its expert's score times one factor."""
    factors = seen["families"][name]["factors"]
    if name == "a function of the model":
        assert factors is None, "nobody says how it makes weights"
        return
    for row in factors:
        assert row == pytest.approx([row[0]] * ROUTED, rel=1e-4) and row[0] > 0


@pytest.mark.parametrize("name", PLACED)
def test_experts_are_placed_behind_re_routing(seen: dict[str, Any], name: str) -> None:
    """EPLB's places hold the experts that re-routing chose, and a row of different experts is a row
    of different places."""
    placed = seen["placed"][name]
    wanted, weights = placed["wanted"]
    assert placed["weights"] == weights
    for logical, physical in zip(wanted, placed["physical"], strict=True):
        places = physical[:ROUTED]
        assert [placed["on_place"][place] for place in places] == logical[:ROUTED]
        assert len(set(places)) == ROUTED
        assert physical[ROUTED:] == logical[ROUTED:], "shared experts have no place"
    used = {place for row in placed["physical"] for place in row[:ROUTED]}
    active = {expert for row in wanted for expert in row[:ROUTED]}
    if "static" in name:
        assert len(used) == len(active), "one place of each expert on a rank"
    else:
        assert len(used) > len(active), "hot experts are spread over their places"


def test_each_ranks_shared_expert_has_a_number_of_its_own(seen: dict[str, Any]) -> None:
    """With DeepEP: behind re-routing, routed experts are renumbered around them."""
    ranks, rank = 4, 1
    own = seen["shared on each rank"]
    wanted, weights = own["wanted"]
    assert own["handed"][1] == ROUTED, "the stage sees routed slots alone"
    on_rank = SHARED // ranks
    for logical, row in zip(wanted, own["ids"], strict=True):
        assert row[:ROUTED] == [expert + expert // on_rank for expert in logical]
        assert row[ROUTED:] == [rank * (on_rank + 1) + on_rank]
    assert [row[:ROUTED] for row in own["weights"]] == weights
