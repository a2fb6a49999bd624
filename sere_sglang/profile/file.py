"""The profile file: similarity per MoE layer, plus where it came from.

One ``.safetensors`` file. Tensors ``layers.{layer_id}.similarity`` ``[E, E]`` float32 or bfloat16
and, optionally, ``layers.{layer_id}.<table>`` (`profile.tables`); metadata strings as in
`ProfileMetadata`, and a checksum (`profile.container`). A reader ignores what it does not know and
refuses a newer major version. Format 1.0 had no checksum.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save

from sere_sglang.errors import ProfileError, cut, shown
from sere_sglang.files import replace_file
from sere_sglang.profile import tables as known_tables
from sere_sglang.profile.container import Container, open_container, sealed
from sere_sglang.profile.loss_shares import loss_shares
from sere_sglang.profile.rule_errors import Candidate, rule_errors
from sere_sglang.profile.tuning import Tuning, read_tuning

FORMAT_VERSION = "1.1"
SURROGATES_VERSION = "1.2"
"""Of a profile with surrogates; one without is written as before."""
TUNED_VERSION = "1.3"
"""Of a profile that was tuned, likewise."""
RULES_VERSION = "1.4"
"""Of a profile that compares the rules, likewise."""
_UNSEALED = "1.0"  # the last format without a checksum
_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")
_TENSOR = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(\w+)")


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
    tuning: Mapping[str, Any] = field(default_factory=dict)
    format_version: str = FORMAT_VERSION


@dataclass
class SereProfile:
    """similarity: layer id -> float32 [E, E]; tables: layer id -> further tensors by name."""

    metadata: ProfileMetadata
    similarity: dict[int, torch.Tensor]
    tables: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    @functools.cached_property
    def tuning(self) -> Tuning:
        """Checked when the profile was loaded."""
        return read_tuning("profile", self.metadata.tuning)

    @functools.cached_property
    def loss_shares(self) -> dict[int, float]:
        """Layer -> what a loss budget of ``energy`` is multiplied by there."""
        return loss_shares({layer: self.tables.get(layer, {}) for layer in self.similarity})

    @functools.cached_property
    def rule_errors(self) -> dict[Candidate, dict[int, float]]:
        """Rule -> layer -> its error where all load equally many experts, best rule first; empty
        where the calibration did not measure them."""
        return rule_errors({layer: self.tables.get(layer, {}) for layer in self.similarity})

    @property
    def num_experts(self) -> int:
        return next(iter(self.similarity.values())).shape[0]


def load_profile(path: str | os.PathLike[str]) -> SereProfile:
    """Read and check a profile, every table of it. Raises `ProfileError` naming the file, what is
    wrong and the fix."""
    found = open_container(path)
    _check_origin(path, found)
    metadata = _read_metadata(path, found.metadata)
    read_tuning(path, metadata.tuning)
    similarity: dict[int, torch.Tensor] = {}
    tables: dict[int, dict[str, torch.Tensor]] = {}
    for name, stored in sorted(found.tensors.items()):
        match = _TENSOR.fullmatch(name)
        if match is None or not known_tables.is_known(match[2]):
            continue
        layer, table = int(match[1]), match[2]
        tensor = known_tables.read_table(f"{path}: {name}", table, stored)
        if table == "similarity":
            similarity[layer] = tensor
        else:
            tables.setdefault(layer, {})[table] = tensor
    if not similarity:
        raise ProfileError(f"{path}: holds no layers.*.similarity tensor; is it a SERE profile?")
    known_tables.check_together(path, similarity, tables, metadata.top_k, metadata.hidden_size)
    return SereProfile(metadata, dict(sorted(similarity.items())), dict(sorted(tables.items())))


def save_profile(profile: SereProfile, path: str | os.PathLike[str]) -> None:
    """Write atomically; the same profile always gives the same bytes. Raises `OSError`."""
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
        if name != "tuning" or value  # one without it is written as before
    }
    replace_file(path, sealed(save(dict(sorted(tensors.items())), metadata)))


def _check_origin(path: Any, found: Container) -> None:
    """Raise `ProfileError` for a format of the future and for what is not what was written."""
    version = found.metadata.get("format_version", _UNSEALED)
    match = _VERSION.fullmatch(version)
    if found.seal == "broken":
        raise ProfileError(
            f"{path}: is damaged, its checksum is not that of its content; copy it again, or "
            "calibrate again"
        )
    if match is None:
        raise ProfileError(
            f"{path}: format_version {shown(version)} is not a version; calibrate again"
        )
    if int(match[1]) > int(FORMAT_VERSION.split(".")[0]):
        raise ProfileError(
            f"{path}: profile format {version} is newer than this sere-sglang reads "
            f"({RULES_VERSION}); upgrade sere-sglang"
        )
    if found.seal == "absent" and version != _UNSEALED:
        raise ProfileError(
            f"{path}: is damaged, format {version} has a checksum and this file has none; "
            "calibrate again"
        )


def _read_metadata(path: Any, raw: Mapping[str, str]) -> ProfileMetadata:
    values: dict[str, Any] = {}
    for f in dataclasses.fields(ProfileMetadata):
        if f.name not in raw:
            continue
        try:
            values[f.name] = _value_of(f, raw[f.name])
        except (ValueError, RecursionError):
            raise ProfileError(
                f"{path}: metadata {f.name} = {shown(raw[f.name])} cannot be read; calibrate again"
            ) from None
    return ProfileMetadata(**{"format_version": _UNSEALED, **values})


def _value_of(field_: dataclasses.Field[Any], text: str) -> Any:
    """Raises `ValueError` when `text` is no value of this field."""
    if field_.type == "str":
        return text
    value = json.loads(text)
    if field_.type != "int":
        fits = isinstance(value, dict)
    else:
        fits = type(value) is int and 0 <= value < 1 << 53
    if not fits:
        raise ValueError(cut(text))
    return value
