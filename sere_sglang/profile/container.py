"""The bytes of a profile: read within bounds, sealed by a checksum, taken apart.

A profile may come from anywhere, so nothing in it is believed before it is checked: not that it is
a file, not its length, not the sizes that it claims.

Every file of format 1.1 carries a checksum in its metadata: SHA-256 over the whole file, the
checksum's own 64 digits counted as zeros. So every byte is covered, padding and header included.
The partial file of a calibration carries the same one (`seal_file`).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
from dataclasses import dataclass

import numpy as np
import safetensors
import torch
from safetensors import SafetensorError

from sere_sglang.errors import PATH_SHOWN, ProfileError, cut

CHECKSUM = "checksum"
"""Name of the metadata entry."""

LARGEST_FILE = 2 << 30
LARGEST_HEADER = 4 << 20  # 400 layers of 20 tables take one


_MARK = b"sere-sha256:"
_DIGITS = 64
UNSIGNED = _MARK.decode() + "0" * _DIGITS
"""A checksum whose digits are still to come."""
_DAMAGE = 3
"""Flipped bits up to which a damaged mark is still known as one, so that no damage can make a
sealed file pass as one of a time that had no checksums."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """One tensor as the file holds it; `data` fits shape and dtype."""

    dtype: str
    shape: tuple[int, ...]
    data: bytearray

    def tensor(self) -> torch.Tensor:
        """Raises `KeyError` for a dtype that no table has."""
        dtype = _DTYPES[self.dtype]
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(self.data, dtype=dtype).reshape(self.shape)


@dataclass(frozen=True)
class Container:
    """metadata: strings by name. seal: "whole", "broken" or, where there is none, "absent"."""

    metadata: dict[str, str]
    tensors: dict[str, Stored]
    seal: str


def open_container(path: str | os.PathLike[str]) -> Container:
    """Read a file and check its structure. Raises `ProfileError` naming the file and the fix."""
    data = _read(path)
    try:
        found = safetensors.deserialize(data)
        header = json.loads(_header(data))
        metadata = dict(header.get("__metadata__") or {})
    except (SafetensorError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None
    tensors = {
        name: Stored(each["dtype"], tuple(each["shape"]), each["data"]) for name, each in found
    }
    return Container(metadata, tensors, _seal_of(data, metadata))


def sealed(payload: bytes) -> bytes:
    """A safetensors payload with ordered metadata and its checksum: the same for the same content.

    safetensors itself writes metadata in hash order, which differs between processes.
    """
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])
    metadata = {**header.pop("__metadata__"), CHECKSUM: UNSIGNED}
    text = json.dumps(
        {"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")
    ).encode()
    text += b" " * (-len(text) % 8)
    unsigned = len(text).to_bytes(8, "little") + text + payload[8 + length :]
    digest = hashlib.sha256(unsigned).hexdigest().encode()
    at = unsigned.index(UNSIGNED.encode()) + len(_MARK)
    return unsigned[:at] + digest + unsigned[at + _DIGITS :]


def seal_file(path: str | os.PathLike[str]) -> None:
    """Fill in the checksum of a file whose metadata has `UNSIGNED`; it takes no memory of its size.

    Raises `OSError`.
    """
    with open(path, "r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            digest = hashlib.sha256(data).hexdigest()
            at = 8 + _header(data).index(UNSIGNED.encode()) + len(_MARK)
        file.seek(at)
        file.write(digest.encode())


def seal_of_file(path: str | os.PathLike[str], metadata: dict[str, str]) -> str:
    """`Container.seal` of a file of any size, of which `metadata` was read. Raises `OSError`."""
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return _seal_of(data, metadata)


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        # Without O_NONBLOCK opening a named pipe would wait for somebody to write.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ProfileError(
            f"{cut(str(path), PATH_SHOWN)}: no such file; write one with 'sere-sglang calibrate'"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _no_profile(path, f"cannot be opened ({reason})") from None
    try:
        return _read_open(path, handle)
    except OSError as error:
        raise _unreadable(path, error) from None
    finally:
        os.close(handle)


def _read_open(path: str | os.PathLike[str], handle: int) -> bytes:
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode):
        is_folder = stat.S_ISDIR(about.st_mode)
        raise _no_profile(path, "is a folder" if is_folder else "is no regular file")
    size = about.st_size
    if size > LARGEST_FILE:
        raise _no_profile(path, f"has {size >> 20} MiB, a profile at most {LARGEST_FILE >> 20}")
    with open(handle, "rb", closefd=False) as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise _unreadable(path, "its header is longer than the file")
        if length > LARGEST_HEADER:
            raise _unreadable(path, f"its header has {length >> 20} MiB")
        header = file.read(length)
        told, there = _told_bytes(path, header), size - 8 - length
        if told != there:
            raise _unreadable(path, f"its header tells of {told} bytes of tables, {there} follow")
        return start + header + file.read(there)


def _told_bytes(path: object, header: bytes) -> int:
    """Where its last table ends; before anything of that size is read. Raises `ProfileError`."""
    try:
        entries = dict(json.loads(header))
        entries.pop("__metadata__", None)
        return max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise _unreadable(path, cut(str(error))) from None


def _header(data: bytes | mmap.mmap) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _seal_of(data: bytes | mmap.mmap, metadata: dict[str, str]) -> str:
    """Whether the checksum in `metadata` is that of `data`."""
    header = _header(data)
    value = metadata.get(CHECKSUM)
    if value is None:
        return "broken" if _holds_mark(header) else "absent"
    text = value.encode()
    whole = len(value) == len(UNSIGNED) and text.startswith(_MARK) and header.count(text) == 1
    if not whole:
        return "broken"
    at = 8 + header.index(text) + len(_MARK)
    digest = hashlib.sha256(memoryview(data)[:at])
    digest.update(b"0" * _DIGITS)
    digest.update(memoryview(data)[at + _DIGITS :])
    return "whole" if digest.hexdigest() == value[len(_MARK) :] else "broken"


def _holds_mark(header: bytes) -> bool:
    """Whether the mark of a checksum, or what up to `_DAMAGE` flipped bits left of it, is there."""
    if len(header) < len(_MARK):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(
        np.frombuffer(header, dtype=np.uint8), len(_MARK)
    )
    flipped = windows ^ np.frombuffer(_MARK, dtype=np.uint8)
    return bool((np.unpackbits(flipped, axis=1).sum(axis=1) <= _DAMAGE).any())


def _unreadable(path: object, reason: object) -> ProfileError:
    return ProfileError(
        f"{cut(str(path), PATH_SHOWN)}: not a readable safetensors file ({cut(str(reason), 200)}); "
        "calibrate again"
    )


def _no_profile(path: object, what: str) -> ProfileError:
    return ProfileError(
        f"{cut(str(path), PATH_SHOWN)}: {what}; name a profile that 'sere-sglang calibrate' wrote"
    )
