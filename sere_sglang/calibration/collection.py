"""What a calibration collects: the request that travels to the workers, and its partial file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sere_sglang.calibration.measures import MOMENT_MEASURES
from sere_sglang.calibration.surrogates import HELD_EVERY, sums_bytes
from sere_sglang.calibration.token_sample import sample_tokens, token_bytes
from sere_sglang.errors import SereError, cut
from sere_sglang.files import is_no_regular_file
from sere_sglang.profile.container import CHECKSUM, UNSIGNED, seal_file, seal_of_file

CKA_MEASURES = ("cka", "cka-rbf", "cka-polynomial")
MEASURES = (*MOMENT_MEASURES, *CKA_MEASURES)

MINIMUM_TOKENS = {**dict.fromkeys(MOMENT_MEASURES, 32), **dict.fromkeys(CKA_MEASURES, 128)}
"""Below these a measure is mostly noise: CKA of few tokens is close to 1 for any two experts."""


_LEAST_BLOCK, _LARGEST_BLOCK = 16, 4096
_COLLECTED = re.compile(r"(0|[1-9][0-9]{0,5})/.+")  # a layer, and what was collected of it


@dataclass(frozen=True)
class SurrogateSpec:
    """rank: of every layer, None where it is chosen. sequence: tokens of a whole sequence."""

    rank: int | None
    sequence: int

    @property
    def flag(self) -> str:
        return f"--surrogate-rank {'auto' if self.rank is None else self.rank}"


@dataclass(frozen=True)
class CollectionSpec:
    """measures: of `MEASURES`, the first becomes the profile's similarity.

    memory: bytes that the experts' outputs, the sums over one block and those of the surrogates,
    and the tokens that rules are tried on may take.
    cka_tokens: how many tokens the CKA measures use (their cost grows with its square).
    surrogates: None to fit none.
    """

    measures: tuple[str, ...] = ("frobenius",)
    weighting: str = "all"
    memory: int = 1 << 30
    cka_tokens: int = 2048
    surrogates: SurrogateSpec | None = None

    @property
    def cka_measures(self) -> tuple[str, ...]:
        return tuple(m for m in self.measures if m in CKA_MEASURES)

    def as_dict(self) -> dict[str, Any]:
        """Without what is not asked for."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def check_enough(
    num_tokens: int, measures: Sequence[str], asked: int, surrogates: SurrogateSpec | None = None
) -> None:
    """Raise `SereError`, with the number needed, when a measure cannot say much."""
    if surrogates is not None and num_tokens < HELD_EVERY * surrogates.sequence:
        raise SereError(
            f"{surrogates.flag} holds out every fourth sequence of --length "
            f"{surrogates.sequence}, the text and --tokens {asked} give {num_tokens} tokens; give "
            f"at least {HELD_EVERY * surrogates.sequence}, or a smaller --length"
        )
    for measure in measures:
        if num_tokens < MINIMUM_TOKENS[measure]:
            raise SereError(
                f"--measure {measure} needs at least {MINIMUM_TOKENS[measure]} tokens, the text "
                f"and --tokens {asked} give {num_tokens}; give more --data or a larger --tokens"
            )


def block_tokens(
    spec: CollectionSpec, num_experts: int, hidden: int, width: int, layers: int = 1
) -> int:
    """Tokens whose outputs of all experts fit the memory of `spec`.

    Per expert and token: the row and its output (16 bit), one or two float64 copies, the
    expert's intermediates. The sums of surrogates and the tokens that rules are tried on are there
    for each of `layers` at once. Raises `SereError` naming the flag when not even 16 tokens fit.
    """
    copies = 2 if spec.weighting == "routed" else 1
    per_token = num_experts * (hidden * (4 + 8 * (copies + 1)) + width * 8)
    sums = layers * sums_bytes(num_experts, hidden) if spec.surrogates else 0
    sample = sample_tokens(spec.memory, num_experts, hidden, layers)
    sampled = layers * sample * token_bytes(num_experts, hidden)
    tokens = (spec.memory - sums - sampled) // per_token
    if tokens < _LEAST_BLOCK:
        needed = -(-(_LEAST_BLOCK * per_token + sums) * 8 // (7 << 20))  # samples take an eighth
        if spec.surrogates:
            one = ", or --layer-by-layer, which holds one layer's at a time" if layers > 1 else ""
            raise SereError(
                f"--memory {spec.memory >> 20}MiB is too little for {spec.surrogates.flag}, whose "
                f"sums take {sums >> 20}MiB (16 bytes x {num_experts} experts x {hidden}^2, "
                f"{layers} layer(s) at once); give at least --memory {needed}MiB{one}"
            )
        raise SereError(
            f"--memory {spec.memory >> 20}MiB holds the outputs of all {num_experts} experts for "
            f"{tokens} tokens; give at least --memory {needed}MiB"
        )
    return min(int(tokens), _LARGEST_BLOCK)


def cka_block(spec: CollectionSpec, num_experts: int, hidden: int, width: int) -> int:
    """Tokens per block of the CKA measures, which hold two blocks of outputs and their norms."""
    per_token = num_experts * (2 * hidden * (4 + 2 + 8) + width * 8)
    fitting = spec.memory // per_token
    # More than the tokens in use would be of no use.
    return max(_LEAST_BLOCK // 2, min(int(fitting), spec.cka_tokens))


def writing(path: Path) -> Path:
    """Where `path` is written until it is whole."""
    return path.with_name(f".{path.name}.writing")


def save_partial(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]
) -> None:
    """Write what is collected so far, atomically, sealed as a profile is. about: JSON values,
    checked by `--resume`."""
    target = Path(path)
    temporary = writing(target)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"about": json.dumps(about), CHECKSUM: UNSIGNED}
    try:
        save_file(contiguous, str(temporary), metadata=metadata)
        seal_file(temporary)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise SereError(
            f"{target}: cannot be written ({error}); free some space or give --out elsewhere"
        ) from None


def load_partial(
    path: str | os.PathLike[str],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and `about` of `save_partial`. Raises `SereError` naming the file."""
    if is_no_regular_file(path):
        raise unusable_partial(path, "it is no regular file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if (seal := seal_of_file(path, metadata)) != "whole":
                raise unusable_partial(path, f"its checksum is {seal}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata["about"])
    except FileNotFoundError:
        raise SereError(f"--resume: {path} does not exist; start without --resume") from None
    except SereError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise unusable_partial(path, error) from None
    if not _is_about(about) or not all(map(_COLLECTED.fullmatch, tensors)):
        raise unusable_partial(path, "its layers or what it says of them are none")
    return tensors, about


def unusable_partial(path: str | os.PathLike[str], reason: object) -> SereError:
    """In a user's words, with what to do."""
    return SereError(
        f"--resume: {path} cannot be read ({cut(str(reason), 200)}); delete it and start without "
        "--resume"
    )


def _is_about(about: Any) -> bool:
    """Whether it tells of a calibration, and how far it came."""
    if not isinstance(about, dict) or not isinstance(about.get("spec"), dict):
        return False
    counts = [about.get("windows_done")]
    if about.get("layer_by_layer"):
        counts.append(about.get("layer"))
    return all(type(count) is int and count >= 0 for count in counts)
