"""What SERE needs to know of a model, from its Hugging Face config; whether a profile fits it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sere_sglang.errors import ProfileError, SereError
from sere_sglang.profile.file import SereProfile
from sere_sglang.profile.model_files import model_folder, weights_fingerprint

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
LOADED_LAYERS = "layers_of_the_loaded_model"
"""Parameter of a profile whose layer ids its model's config does not tell."""


@dataclass(frozen=True)
class MoeModelInfo:
    """An MoE model's shape.

    name: a folder or a hub id, of which `revision` is meant. layer_ids: decoder layers that have
    routed experts. layers_are_loaded: they are the loaded model's, and its config says otherwise.
    """

    name: str
    architecture: str
    num_layers: int
    layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    revision: str | None = None
    layers_are_loaded: bool = False

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, name: str, revision: str | None = None
    ) -> MoeModelInfo:
        """From the contents of config.json. Raises `SereError` for a model without experts."""
        text = _text_config(config)
        architecture = (config.get("architectures") or ["unknown architecture"])[0]
        num_experts = _first(text, _NUM_EXPERTS)
        top_k = _first(text, _TOP_K)
        if not num_experts or num_experts < 2 or not top_k:
            raise SereError(
                f"--moe-backend sere: {name} ({architecture}) is a dense model, it has no routed "
                "experts to skip; drop --moe-backend sere"
            )
        num_layers = int(text.get("num_hidden_layers") or 0)
        layer_ids = tuple(i for i in range(num_layers) if _is_moe_layer(text, i))
        if not layer_ids:
            raise SereError(
                f"--moe-backend sere: no layer of {name} ({architecture}) has experts according "
                "to its config; drop --moe-backend sere"
            )
        return cls(
            name=name,
            architecture=architecture,
            num_layers=num_layers,
            layer_ids=layer_ids,
            num_experts=int(num_experts),
            top_k=int(top_k),
            hidden_size=int(text.get("hidden_size") or 0),
            revision=revision,
        )

    def with_loaded(self, layer_ids: Iterable[int]) -> MoeModelInfo:
        """The same with the MoE layers of the loaded model, which know better than what is read of
        a config."""
        loaded = tuple(sorted(layer_ids))
        if loaded == self.layer_ids:
            return self
        return dataclasses.replace(self, layer_ids=loaded, layers_are_loaded=True)

    @classmethod
    def from_folder(cls, folder: str | Path) -> MoeModelInfo:
        """From ``folder/config.json``."""
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise SereError(f"{path}: no such file; --model must be a model folder") from None
        except json.JSONDecodeError as error:
            raise SereError(f"{path}: not valid JSON ({error})") from None
        return cls.from_config(config, name=str(folder))

    @cached_property  # it reads files
    def weights(self) -> str:
        """A hash of the weights, as they were when first asked; empty when they are not here."""
        return weights_fingerprint(model_folder(self.name, self.revision))

    @property
    def fingerprint(self) -> str:
        """A hash of everything a profile depends on but the weights themselves."""
        shape = [self.architecture, self.num_layers, self.layer_ids]
        shape += [self.num_experts, self.top_k, self.hidden_size]
        return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]


def check_profile_fits(profile: SereProfile, model: MoeModelInfo, path: Path) -> None:
    """Raise `ProfileError`, with both sides, unless `profile` was made for this model's shape.

    Where calibration had the layer ids from the loaded model, they are compared with that once it
    has loaded (`runtime.bind`).
    """
    meta = profile.metadata
    if meta.method_parameters.get(LOADED_LAYERS):
        model = model.with_loaded(profile.similarity)
    sides = [
        ("experts", profile.num_experts, model.num_experts),
        ("MoE layers", sorted(profile.similarity), list(model.layer_ids)),
        ("architecture", meta.architecture, model.architecture),
        ("experts per token", meta.top_k, model.top_k),
        ("hidden size", meta.hidden_size, model.hidden_size),
        ("config fingerprint", meta.fingerprint, model.fingerprint),
        ("weights", meta.weights, model.weights),
    ]
    wrong = [f"{what}: profile {p}, model {m}" for what, p, m in sides if p and m and p != m]
    if wrong:
        raise ProfileError(
            f"--sere-profile {path} (of {meta.model or 'an unnamed model'}) does not fit "
            f"{model.name}: {'; '.join(wrong)}. Calibrate this model: "
            f"sere-sglang calibrate --model {model.name}"
        )


def check_has_scale(profile: SereProfile, model: MoeModelInfo, path: Path) -> None:
    """Raise `ProfileError` unless every layer has what ``--sere-scale`` multiplies by."""
    if not all("scale" in profile.tables.get(layer, {}) for layer in profile.similarity):
        raise ProfileError(
            f"--sere-scale: {path} has no scale tables; drop the flag, or write them with "
            f"'sere-sglang calibrate --model {model.name} --measure "
            f"{profile.metadata.method or 'frobenius'} --measure residual'"
        )


def surrogates_command(profile: SereProfile, model: MoeModelInfo) -> str | None:
    """What writes surrogates for a profile that has none; None for one that has."""
    if any("surrogate_bias" in tables for tables in profile.tables.values()):
        return None
    return f"sere-sglang calibrate --model {model.name} --surrogate-rank auto"


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        nested = config.get(key)
        if isinstance(nested, Mapping):
            return _text_config(nested)
    return config


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[n] for n in names if isinstance(config.get(n), int)), None)


def _is_moe_layer(config: Mapping[str, Any], layer: int) -> bool:
    """Each family's own rule; a model that states none has experts in every layer."""
    if layer in (config.get("mlp_only_layers") or []):
        return False
    for listed, is_moe in _LISTED:
        stated = config.get(listed)
        if isinstance(stated, (list, tuple, str)) and len(stated) > layer:
            return is_moe(stated[layer])
    if layer < (config.get("first_k_dense_replace") or config.get("num_dense_layers") or 0):
        return False
    start, end = config.get("moe_layer_start_index"), config.get("moe_layer_end_index")
    if isinstance(start, int):  # ERNIE
        last = end if isinstance(end, int) and end >= 0 else layer
        every = config.get("moe_layer_interval") or 1
        return start <= layer <= last and (layer + 1) % every == 0
    frequency = config.get("moe_layer_freq") or 1
    if isinstance(frequency, list):
        return bool(frequency[layer])
    if layer % frequency != 0:
        return False
    if config.get("moe_layers_enum"):
        return str(layer) in str(config["moe_layers_enum"]).split(",")
    if "interleave_moe_layer_step" in config:
        return (layer + 1) % config["interleave_moe_layer_step"] == 0
    return (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0


_LISTED: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("mlp_layer_types", lambda kind: kind != "dense"),
    ("hybrid_override_pattern", lambda kind: kind == "E"),
    ("is_moe_layer", bool),
)
"""Keys that say it layer by layer."""
