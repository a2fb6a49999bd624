"""Mutations of a real profile file."""

from __future__ import annotations

import json
import random
from typing import Any

import torch
from safetensors.torch import save

from sere_sglang.profile.container import CHECKSUM, sealed

_NUMBERS = (0, 1, -1, 2, 3, 5, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 10**400, 1.5, 1e308)
_WORDS = (
    "", "F32", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "9.9", "1.1", "1.0", "nan", "[1]", "{}",
    "layers.0.similarity", "layers.0.popularity", "layers.99.scale", "layers.00.similarity", "\0",
    "x" * 5000, "[" * 5000, "1" * 5000,
)  # fmt: skip


def parts_of(payload: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, tensor bytes)."""
    length = int.from_bytes(payload[:8], "little")
    return json.loads(payload[8 : 8 + length]), payload[8 + length :]


def joined(header: Any, tensors: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def damaged(payload: bytes, draw: random.Random) -> bytes:
    """Bytes changed by somebody who knows nothing of the format."""
    data = bytearray(payload)
    for _ in range(draw.choice((1, 1, 1, 2, 8, 64))):
        at = (
            draw.randrange(len(data))
            if draw.random() < 0.5
            else draw.randrange(min(len(data), 900))
        )
        how = draw.randrange(7)
        if how <= 1:
            data[at] ^= 1 << draw.randrange(8)
        elif how == 2:
            data[at] = draw.randrange(256)
        elif how == 3:
            del data[at : at + draw.choice((1, 8, 100, 1 << 20))]
        elif how == 4:
            data[at:at] = draw.randbytes(draw.choice((1, 8, 64)))
        elif how == 5:
            lengths = (0, 1, len(data), max(0, len(data) - 8), 1 << 20, 1 << 31, (1 << 64) - 1)
            length = draw.choice(lengths)
            data[:8] = length.to_bytes(8, "little")
        else:
            other = draw.randrange(len(data))
            data[at : at + 16] = data[other : other + 16]
        if not data:
            break
    return bytes(data)


def forged(payload: bytes, draw: random.Random) -> bytes:
    """Changed with a checksum that fits: what stands behind it must be checked as well."""
    header, tensors = parts_of(payload)
    metadata = header.pop("__metadata__")
    metadata.pop(CHECKSUM)
    for _ in range(draw.choice((1, 1, 2, 4))):
        how = draw.randrange(6)
        if how == 0:
            metadata[draw.choice((*metadata, "more"))] = draw.choice(_WORDS)
        elif how == 1:
            metadata.pop(draw.choice(tuple(metadata)), None)
        elif how == 2 and header:
            _change_entry(header, draw)
        elif how == 3:
            tensors = _changed_values(tensors, draw)
        elif how == 4 and header:
            header[draw.choice(_WORDS)] = header.pop(draw.choice(tuple(header)))
        elif how == 5 and header:
            header.pop(draw.choice(tuple(header)))
    whole = joined({"__metadata__": metadata, **header}, tensors)
    try:
        return sealed(whole)
    except (ValueError, RecursionError):
        return whole


def _change_entry(header: dict[str, Any], draw: random.Random) -> None:
    entry = header[draw.choice(tuple(header))]
    key = draw.choice(("dtype", "shape", "data_offsets", "more"))
    if key == "dtype":
        entry[key] = draw.choice((*_WORDS, 5, None))
    elif key == "more":
        entry.pop(draw.choice(tuple(entry)))
    else:
        numbers = [draw.choice(_NUMBERS) for _ in range(draw.randrange(4))]
        entry[key] = draw.choice((numbers, list(reversed(entry.get(key) or [])), "x", None))


def _changed_values(tensors: bytes, draw: random.Random) -> bytes:
    """One number of a table becomes a NaN, an infinity, a negative or a huge one."""
    data = bytearray(tensors)
    kind = draw.choice((torch.float32, torch.int64, torch.bfloat16))
    value = draw.choice((float("nan"), float("inf"), -1.0, 2.0, 0.0, 1e30))
    if kind is torch.int64:
        value = draw.choice((-1, 0, 1 << 62))
    number = torch.tensor([value], dtype=kind).view(torch.uint8).numpy().tobytes()
    at = draw.randrange(max(1, len(data) // len(number))) * len(number)
    data[at : at + len(number)] = number
    return bytes(data[: len(tensors)])


def unsealed(tables: dict[str, torch.Tensor]) -> bytes:
    """A file of the time before checksums, which anybody can write."""
    return save(tables, {"format_version": "1.0"})
