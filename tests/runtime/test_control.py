"""The control block: what a kernel would read, per layer and row."""

from __future__ import annotations

import torch

from sere_sglang.ops.control import decode_control
from sere_sglang.runtime.control import ControlBlock
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
