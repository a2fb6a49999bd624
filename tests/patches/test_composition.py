"""What a forward batch of SGLang becomes, by where the MoE layers' rows are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sere_sglang.config import quality_rules
from sere_sglang.errors import SereError
from sere_sglang.options import SereConfig
from sere_sglang.patches import moe_rows
from sere_sglang.patches.forward_batch import _ATTRIBUTE, Noted
from sere_sglang.patches.model_runner import composition_of
from sere_sglang.schedule.composition import BatchComposition, MoeRows

OWN, GATHERED, SLICE = MoeRows.OWN, MoeRows.GATHERED, MoeRows.SLICE


def _batch(mode: str, tokens: int, **more: Any) -> SimpleNamespace:
    values = {
        "forward_mode": SimpleNamespace(name=mode),
        "input_ids": range(0),
        "extend_seq_lens_cpu": None,
        "global_num_tokens_cpu": None,
        "is_extend_in_batch": False,
        "spec_info": None,
        _ATTRIBUTE: Noted(running=5, waiting=2, after_idle=True),
    }
    batch = SimpleNamespace(**values | more)
    batch.input_ids = SimpleNamespace(shape=(tokens,))
    return batch


def _of(batch: Any, rows: MoeRows, *, groups: int = 1, attn_tp: int = 1) -> BatchComposition:
    parallel = SimpleNamespace(attn_dp_enabled=groups > 1, attn_tp_size=attn_tp)
    return composition_of(batch, rows, parallel)


@pytest.mark.parametrize(
    ("mode", "tokens", "lengths", "expected"),
    [
        ("DECODE", 7, None, ("decode", 7, 0, 0)),
        ("TARGET_VERIFY", 12, None, ("verify", 0, 0, 12)),
        ("EXTEND", 90, [50, 40], ("extend", 0, 90, 0)),
        ("MIXED", 43, [40, 1, 1, 1], ("mixed", 3, 40, 0)),
        ("IDLE", 0, None, ("idle", 0, 0, 0)),
    ],
)
def test_own_rows(mode: str, tokens: int, lengths: Any, expected: tuple[Any, ...]) -> None:
    seen = _of(_batch(mode, tokens, extend_seq_lens_cpu=lengths), OWN)
    got = (seen.mode, seen.decode_tokens, seen.prefill_tokens, seen.verify_tokens)
    assert got == expected
    assert (seen.running, seen.waiting, seen.after_idle) == (5, 2, True)
    assert seen.padded_rows == tokens


@pytest.mark.parametrize(
    ("modes", "counts", "extends", "draft", "expected"),
    [
        (("DECODE", "DECODE"), [3, 9], False, None, ("decode", 12, 0, 0, 12)),
        (("DECODE", "IDLE"), [3, 0], False, None, ("decode", 3, 0, 0, 3)),
        (("DECODE", "EXTEND"), [3, 70], True, None, ("mixed", 0, 73, 0, 0)),
        (("TARGET_VERIFY", "IDLE"), [8, 0], False, 4, ("verify", 0, 0, 8, 2)),
        (("IDLE", "IDLE"), [0, 0], False, None, ("idle", 0, 0, 0, 0)),
    ],
)
def test_gathered_rows_look_alike_to_every_group(
    modes: tuple[str, str],
    counts: list[int],
    extends: bool,
    draft: int | None,
    expected: tuple[Any, ...],
) -> None:
    spec_info = None if draft is None else SimpleNamespace(num_tokens_per_req=draft)
    seen = [
        _of(
            _batch(
                mode,
                own,
                global_num_tokens_cpu=counts,
                is_extend_in_batch=extends,
                spec_info=spec_info,
            ),
            GATHERED,
            groups=2,
        )
        for mode, own in zip(modes, counts, strict=True)
    ]
    assert seen[0] == seen[1]
    one = seen[0]
    got = (one.mode, one.decode_tokens, one.prefill_tokens, one.verify_tokens, one.running)
    assert got == expected


def test_a_group_without_requests_says_nothing_of_drafts() -> None:
    batch = _batch(
        "IDLE",
        0,
        global_num_tokens_cpu=[8, 0],
        is_extend_in_batch=False,
        spec_info=SimpleNamespace(num_tokens_per_req=-1),
    )
    assert _of(batch, GATHERED, groups=2).running >= 0


def test_a_slice_counts_what_this_rank_routes() -> None:
    assert _of(_batch("DECODE", 9), SLICE, attn_tp=4).decode_tokens == 3


def test_own_rows_of_a_group_are_exact_while_another_prefills() -> None:
    busy = _of(_batch("DECODE", 9, is_extend_in_batch=True), OWN, groups=2)
    assert busy.mode == "mixed" and busy.num_tokens == 9 and not busy.is_decode_like
    assert _of(_batch("DECODE", 9), OWN, groups=2).is_decode_like


def _restricted(monkeypatch: pytest.MonkeyPatch, asked: SereConfig, **flags: Any) -> SereConfig:
    values = {
        "attn_dp_size": 1,
        "tp_size": 1,
        "moe_a2a_backend": "none",
        "enable_dp_attention_local_control_broadcast": False,
    }
    view = SimpleNamespace(**values | flags)
    monkeypatch.setattr(moe_rows, "resolve", lambda _name: lambda _record: view)
    return moe_rows.restrict(None, asked)


@pytest.mark.parametrize(
    ("flags", "quality"),
    [
        ({"tp_size": 8}, True),
        ({"tp_size": 8, "attn_dp_size": 8}, False),
        ({"tp_size": 8, "attn_dp_size": 8, "moe_a2a_backend": "deepep"}, True),
        ({"tp_size": 8, "attn_dp_size": 2, "moe_a2a_backend": "deepep"}, False),
        ({"tp_size": 8, "moe_a2a_backend": "deepep"}, False),
    ],
)
def test_quality_per_request_needs_ranks_that_know_their_rows(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], quality: bool
) -> None:
    asked = SereConfig(moe_backend="sere")
    left = quality_rules(_restricted(monkeypatch, asked, **flags))
    assert (left.allowed == ("balanced",)) is not quality
    picky = SereConfig(moe_backend="sere", sere_allow_quality="exact,balanced")
    if quality:
        assert _restricted(monkeypatch, picky, **flags) == picky
    else:
        with pytest.raises(SereError, match="--sere-allow-quality exact,balanced: per-request"):
            _restricted(monkeypatch, picky, **flags)


def test_groups_that_would_not_hear_rank_0_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SereError, match="--enable-dp-attention-local-control-broadcast"):
        _restricted(
            monkeypatch,
            SereConfig(moe_backend="sere"),
            tp_size=2,
            attn_dp_size=2,
            enable_dp_attention_local_control_broadcast=True,
        )
