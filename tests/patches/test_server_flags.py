"""Flags of SGLang's that rule SERE out are named at start, with the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from sere_sglang.errors import SereError
from sere_sglang.patches import server_flags, shadow
from sere_sglang.patches.server_flags import (
    _FUSED_FRONT,
    ONE_ALONE,
    UNSUPPORTED,
    require_supported,
)


@pytest.fixture(autouse=True)
def _record_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolved view needs a whole server's record; what is checked are its fields."""
    monkeypatch.setattr(server_flags, "resolve", lambda _symbol: lambda record: record)


def _record(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**(dict.fromkeys(UNSUPPORTED) | dict.fromkeys(ONE_ALONE, 1) | given))


def test_sglang_has_these_fields() -> None:
    assert {*UNSUPPORTED, *ONE_ALONE} <= set(ServerArgs.__struct_fields__)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_each_is_refused_by_name(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(SereError, match=f"--moe-backend sere: with {flag} .*; drop one of the two"):
        require_supported(_record(**{name: "x"}))


@pytest.mark.parametrize("name", ONE_ALONE)
def test_parts_that_were_not_followed_are_refused(name: str) -> None:
    with pytest.raises(SereError, match="--" + name.replace("_", "-") + " above 1"):
        require_supported(_record(**{name: 2}))


def test_graphs_that_are_compared_without_our_launches_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SGLANG_ENABLE_CUDA_GRAPH_DEDUP", "1")
    with pytest.raises(SereError, match="SGLANG_ENABLE_CUDA_GRAPH_DEDUP"):
        require_supported(_record())


def test_others_are_not() -> None:
    require_supported(_record())


def test_ragged_verify_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_RAGGED_VERIFY_MODE", "cap")
    with pytest.raises(SereError, match="SGLANG_RAGGED_VERIFY_MODE=cap"):
        require_supported(_record())


def test_packed_ids_of_the_experimental_lora_path_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SGLANG_EXPERIMENTAL_LORA_OPTI", "1")
    with pytest.raises(SereError, match="set SGLANG_OPT_LORA_FUSED_TOPK_PACK=0"):
        require_supported(_record())
    monkeypatch.setenv("SGLANG_OPT_LORA_FUSED_TOPK_PACK", "0")
    require_supported(_record())


def test_a_router_inside_another_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SereError, match="set SGLANG_K3_FUSED_FRONT=0"):
        require_supported(_record(), _FUSED_FRONT)
    monkeypatch.setenv("SGLANG_K3_FUSED_FRONT", "0")
    require_supported(_record(), _FUSED_FRONT)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm"),
        ({"disaggregation_mode": "decode"}, "--disaggregation-mode"),
        ({"tokenizer_worker_num": 2}, "--tokenizer-worker-num"),
    ],
)
def test_where_requests_cannot_be_scored_again(changes: dict[str, Any], flag: str) -> None:
    fields: dict[str, Any] = {"speculative_algorithm": None, "disaggregation_mode": "null"}
    fields |= {"tokenizer_worker_num": 1}
    assert set(fields) <= set(ServerArgs.__struct_fields__)
    shadow.require_supported(SimpleNamespace(**fields))
    with pytest.raises(SereError, match=f"--sere-shadow: with {flag} .*; drop one of the two"):
        shadow.require_supported(SimpleNamespace(**fields | changes))
