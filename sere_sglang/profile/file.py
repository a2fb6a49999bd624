"""The profile file: similarity per MoE layer, plus where it came from.

One ``.safetensors`` file. Tensors ``layers.{layer_id}.similarity`` ``[E, E]`` float32 or bfloat16
and, optionally, ``layers.{layer_id}.<table>``; metadata strings as in `ProfileMetadata`. A reader
ignores what it does not know and refuses a newer major version.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sere_sglang.errors import SereError

FORMAT_VERSION = "1.0"
_TENSOR = re.compile(r"^layers\.(\d+)\.(\w+)$")


class ProfileError(SereError):
    """A profile that cannot be used, with the file and the fix."""


@dataclass(frozen=True)
class ProfileMetadata:
    """Provenance; every field is one metadata string of the file (JSON where not a string).

    fingerprint: hash of the model's config; weights: hash of its checkpoint files. An empty or
    zero field is unknown, and nothing is held against it.
    """

    model: str = ""
    architecture: str = ""
    fingerprint: str = ""
    weights: str = ""
    num_layers: int = 0
    num_experts: int = 0
    top_k: int = 0
    hidden_size: int = 0
    method: str = ""
    method_parameters: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    num_tokens: int = 0
    tool_version: str = ""
    date: str = ""
    format_version: str = FORMAT_VERSION


@dataclass
class SereProfile:
    """similarity: layer id -> float32 [E, E]; tables: layer id -> further tensors by name."""

    metadata: ProfileMetadata
    similarity: dict[int, torch.Tensor]
    tables: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return next(iter(self.similarity.values())).shape[0]


def load_profile(path: str | os.PathLike[str]) -> SereProfile:
    """Read and validate a profile. Raises `ProfileError` naming the file and the fix."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = _read_metadata(path, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ProfileError(
            f"{path}: no such file; write one with 'sere-sglang calibrate'"
        ) from None
    except (SafetensorError, OSError) as error:
        raise ProfileError(
            f"{path}: not a readable safetensors file ({error}); calibrate again"
        ) from None
    similarity: dict[int, torch.Tensor] = {}
    tables: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.match(name)
        if match is None:
            continue
        layer, table = int(match[1]), match[2]
        if table == "similarity":
            similarity[layer] = _checked(path, layer, tensor)
        else:
            tables.setdefault(layer, {})[table] = tensor
    if not similarity:
        raise ProfileError(f"{path}: holds no layers.*.similarity tensor; is it a SERE profile?")
    sizes = {layer: matrix.shape[0] for layer, matrix in similarity.items()}
    if len(set(sizes.values())) > 1:
        raise ProfileError(f"{path}: layers disagree about the number of experts: {sizes}")
    return SereProfile(metadata, dict(sorted(similarity.items())), tables)


def save_profile(profile: SereProfile, path: str | os.PathLike[str]) -> None:
    """Write atomically; the same profile always gives the same bytes."""
    tensors = {
        f"layers.{layer}.similarity": matrix.contiguous()
        for layer, matrix in profile.similarity.items()
    }
    for layer, named in profile.tables.items():
        tensors |= {f"layers.{layer}.{name}": tensor.contiguous() for name, tensor in named.items()}
    fields = dataclasses.asdict(profile.metadata)
    metadata = {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in fields.items()
    }
    payload = _with_sorted_metadata(save(dict(sorted(tensors.items())), metadata))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(payload)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _with_sorted_metadata(payload: bytes) -> bytes:
    # safetensors writes metadata in hash order, which differs between processes.
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])
    ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(ordered, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload[8 + length :]


def _read_metadata(path: Any, raw: Mapping[str, str]) -> ProfileMetadata:
    version = raw.get("format_version", FORMAT_VERSION)
    major = version.split(".")[0]
    if not major.isdigit():
        raise ProfileError(f"{path}: format_version {version!r} is no version; calibrate again")
    if int(major) > int(FORMAT_VERSION.split(".")[0]):
        raise ProfileError(
            f"{path}: profile format {version} is newer than this sere-sglang reads "
            f"({FORMAT_VERSION}); upgrade sere-sglang"
        )
    values: dict[str, Any] = {}
    for f in dataclasses.fields(ProfileMetadata):
        if f.name not in raw:
            continue
        is_text = f.type == "str"
        try:
            values[f.name] = raw[f.name] if is_text else json.loads(raw[f.name])
        except json.JSONDecodeError:
            raise ProfileError(
                f"{path}: metadata {f.name} = {raw[f.name]!r} cannot be read; calibrate again"
            ) from None
    return ProfileMetadata(**values)


def _checked(path: Any, layer: int, tensor: torch.Tensor) -> torch.Tensor:
    """float32 copy of one layer's matrix; raises `ProfileError` when it is no similarity."""
    where = f"{path}: layers.{layer}.similarity"
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise ProfileError(f"{where} is {tensor.dtype}; expected float32 or bfloat16")
    if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1] or tensor.shape[0] == 0:
        raise ProfileError(f"{where} has shape {list(tensor.shape)}; expected [E, E]")
    matrix = tensor.float()
    for what, bad in (
        ("NaN", matrix.isnan()),
        ("a value outside [0, 1]", ~((matrix >= 0) & (matrix <= 1))),
    ):
        if bad.any():
            i, j = bad.nonzero()[0].tolist()
            raise ProfileError(
                f"{where} holds {what} ({matrix[i, j].item():g} at [{i}, {j}], "
                f"{int(bad.sum())} in all); calibrate again"
            )
    if not (matrix.diagonal() == 1).all():
        i = int((matrix.diagonal() != 1).nonzero()[0])
        raise ProfileError(
            f"{where}: expert {i} is {matrix[i, i].item():g} similar to itself, not 1; "
            "calibrate again"
        )
    return matrix
