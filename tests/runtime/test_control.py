"""The control block: what a kernel would read, per layer and row."""

from __future__ import annotations

import torch

from sere_sglang.ops.control import decode_control
from sere_sglang.ops.rule_block import encode_rule
from sere_sglang.runtime.control import ControlBlock
from sere_sglang.runtime.graph_rules import RuleWords
from sere_sglang.schedule.point import OFF, OperatingPoint

CLASSES = ((8, 0.0), (1, 0.25))


def _block() -> ControlBlock:
    return ControlBlock(torch.device("cpu"), [3, 5, 9], max_rows=64)


def test_every_layer_reads_the_point() -> None:
    block = _block()
    words = block.words
    block.write(OperatingPoint(True, 2, 0.5), 17)
    for row in words:
        read = decode_control(row)
        assert (read.enabled, read.num_valid, read.classes) == (True, 17, ((2, 0.5),))
    block.write(OFF, 17)
    assert not any(decode_control(row).enabled for row in words)
    assert words.data_ptr() == block.words.data_ptr(), "captured graphs hold this address"


def test_layers_may_differ() -> None:
    block = _block()
    point = OperatingPoint(True, 2, 0.5, layers=((5, OperatingPoint(True, 4, 0.0)), (9, OFF)))
    block.write(point, 6)
    first, second, third = (decode_control(row) for row in block.words)
    assert first.classes == ((2, 0.5),) and second.classes == ((4, 0.0),)
    assert not third.enabled


def test_rows_carry_classes_and_lose_them_again() -> None:
    block = _block()
    block.write(OperatingPoint(True, 2, 0.5), 4, bytes([0, 1, 2, 1]), CLASSES)
    assert block.row_class[:4].tolist() == [0, 1, 2, 1]
    assert decode_control(block.words[0]).classes == ((2, 0.5), *CLASSES)
    block.write(OperatingPoint(True, 2, 0.5), 4)
    assert decode_control(block.words[0]).classes == ((2, 0.5),)
    block.write(OFF, 4, bytes([1] * 4), CLASSES)
    assert not decode_control(block.words[0]).enabled


def _rule_block() -> ControlBlock:
    words = {
        3: RuleWords(16, 4.0, has_scores=True, has_surrogates=True),
        5: RuleWords(16, 1.0, has_scores=False, has_surrogates=False),
    }
    return ControlBlock(torch.device("cpu"), [3, 5], max_rows=64, rules=words)


def test_a_rule_is_written_beside_re_routing_which_is_off() -> None:
    block = _rule_block()
    assert block.rule_words is not None
    point = OperatingPoint(True, rule="energy", loss=0.25)
    block.write(point, 6, bytes([0, 2]), CLASSES, fast_keep=3, surrogates=True)
    assert not any(decode_control(row).enabled for row in block.words)
    # Layer 3 has surrogates: nothing is filled or scaled; layer 5 has no scores to fill by.
    first = encode_rule(
        "energy", num_valid=6, budget=16, lost=True, classes=True, loss=1.0, fast_keep=1
    )
    second = encode_rule(
        "energy", num_valid=6, budget=16, classes=True, loss=0.25, renormalize=0.25
    )
    assert block.rule_words.tolist() == [first.tolist(), second.tolist()]
    assert block.row_class[:2].tolist() == [0, 2]
    block.write(point, 6, fast_keep=3, surrogates=False)
    first = encode_rule(
        "energy", num_valid=6, budget=16, loss=1.0, fill_weight=0.5, renormalize=0.25
    )
    assert block.rule_words[0].tolist() == first.tolist()


def test_re_routing_and_exact_forwards_leave_the_rules_off() -> None:
    block = _rule_block()
    assert block.rule_words is not None
    piggyback = OperatingPoint(True, 2, rule="piggyback", layers=((5, OFF),))
    block.write(piggyback, 6, bytes([2]), CLASSES, fast_keep=3)
    first, second = block.rule_words.tolist()
    own = encode_rule("piggyback", num_valid=6, keep=2, fast_keep=3, budget=16, classes=True,
                      renormalize=0.25)  # fmt: skip
    assert first == own.tolist() and second[0] == 0
    block.write(OperatingPoint(True, 2, 0.5), 6)
    assert not block.rule_words[:, 0].any()
    assert all(decode_control(row).classes == ((2, 0.5),) for row in block.words)
    block.write(piggyback, 6)
    block.write(OFF, 6)
    assert not block.rule_words[:, 0].any()
    assert not any(decode_control(row).enabled for row in block.words)
