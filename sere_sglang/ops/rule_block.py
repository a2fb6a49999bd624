"""The rule block: what one layer's rule runs at, as 16 int32 words in device memory.

As the control block (control.py), for the rules beside ``similarity``: kernels read it, a server
writes it before a forward, so one captured graph serves every rule and every operating point.
Layout (word: meaning):

    0      `rules_call.CODES` of the rule; 0 (``similarity``) leaves rows as they are
    1      num_valid; rows >= it are padding, negative means every row is valid
    2, 3   slots of a row that are sure of their expert: of normal rows, of fast rows
    4      B of ``budget``
    5      flags, `FLAG_WARMUP` and so on
    6, 7   the loss budget per valid row, the bits of a float64, low word first
    8      a of ``energy``, the bits of a float32
    9      gamma of ``energy``, likewise
    10..15 reserved, 0

Row classes are bits: `PROTECTED_ROW`, `FAST_ROW`; the values of `names.RowClass`
are such.
"""

from __future__ import annotations

import struct

import torch

from sere_sglang.ops.rules_call import CODES, RuleCall

RULE_WORDS = 16
FLAG_WARMUP = 1
FLAG_TRUNCATE = 2
FLAG_LOST = 4  # write what rows lost
FLAG_CLASSES = 8  # rows have classes; without it those in memory are not looked at
PROTECTED_ROW, FAST_ROW = 1, 2

_LAYOUT = struct.Struct("=6id2f6i")


def encode_rule(
    rule: str,
    *,
    num_valid: int = -1,
    keep: int = 1,
    fast_keep: int = 1,
    budget: int = 1,
    warmup: bool = True,
    truncate: bool = False,
    lost: bool = False,
    classes: bool = False,
    loss: float = 0.0,
    fill_weight: float = 0.0,
    renormalize: float = 0.0,
) -> torch.Tensor:
    """Pack a rule block; the arguments are those of `RuleCall`.

    Args:
        lost: write what rows lost (`Routed.lost`).
        classes: rows have classes.

    Returns:
        int32 ``[16]`` on the CPU; copy it to where the ids are.
    """
    flags = {FLAG_WARMUP: warmup, FLAG_TRUNCATE: truncate, FLAG_LOST: lost, FLAG_CLASSES: classes}
    words = _LAYOUT.pack(
        CODES[rule],
        num_valid,
        keep,
        fast_keep,
        budget,
        sum(flag for flag, is_set in flags.items() if is_set),
        loss,
        fill_weight,
        renormalize,
        *[0] * 6,
    )
    return torch.frombuffer(bytearray(words), dtype=torch.int32)


def block_of(call: RuleCall) -> torch.Tensor:
    """int32 ``[16]`` on the CPU: the options of a call."""
    return encode_rule(
        call.rule,
        num_valid=call.num_valid,
        keep=call.keep,
        fast_keep=call.fast_keep,
        budget=call.budget,
        warmup=call.warmup,
        truncate=call.truncate,
        lost=True,
        classes=call.protected is not None or call.fast is not None,
        loss=call.loss,
        fill_weight=call.fill_weight,
        renormalize=call.renormalize,
    )


def classes_of(call: RuleCall) -> torch.Tensor | None:
    """uint8 ``[T]`` of a call's masks; None without any."""
    masks = ((call.protected, PROTECTED_ROW), (call.fast, FAST_ROW))
    bits = [mask.to(torch.uint8) * bit for mask, bit in masks if mask is not None]
    return None if not bits else bits[0] if len(bits) == 1 else bits[0] | bits[1]
