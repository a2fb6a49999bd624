"""From what was collected to a profile."""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

import torch

from sere_sglang.calibration.job import CalibrationJob
from sere_sglang.calibration.measures import (
    MOMENT_MEASURES,
    Moments,
    similarity,
    substitution_scale,
)
from sere_sglang.calibration.statistics import FITTED
from sere_sglang.calibration.stream import stream_energy
from sere_sglang.calibration.text import CalibrationText
from sere_sglang.profile import (
    FORMAT_VERSION,
    LOADED_LAYERS,
    RULES_VERSION,
    SURROGATES_VERSION,
    MoeModelInfo,
    ProfileMetadata,
    SereProfile,
)

State = dict[str, torch.Tensor]
"""Collected tensors, ``{layer}/{name}``; the names are those of `LayerCollector.state`."""


def layer_ids(state: State) -> list[int]:
    return sorted({int(name.split("/")[0]) for name in state})


def build_profile(
    job: CalibrationJob, text: CalibrationText, state: State, model: MoeModelInfo
) -> SereProfile:
    """The profile of what was collected: the first measure leads, the others are tables."""
    from sere_sglang import __version__

    spec = job.spec
    matrices: dict[int, torch.Tensor] = {}
    tables: dict[int, dict[str, torch.Tensor]] = {}
    for layer in layer_ids(state):
        own = {n.split("/", 1)[1]: t for n, t in state.items() if n.startswith(f"{layer}/")}
        matrices[layer], tables[layer] = _of_layer(job, own)
    metadata = ProfileMetadata(
        model=job.model,
        architecture=model.architecture,
        fingerprint=model.fingerprint,
        weights=job.weights,
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        hidden_size=model.hidden_size,
        method=spec.measures[0],
        method_parameters=_parameters(job, text, model),
        data=text.name,
        num_tokens=text.num_tokens,
        tool_version=__version__,
        date=_today(),
        format_version=_version(tables),
    )
    return SereProfile(metadata, matrices, tables)


def _version(tables: dict[int, dict[str, torch.Tensor]]) -> str:
    """The oldest format that knows all of them."""
    names = {name for own in tables.values() for name in own}
    if "energy_weights" in names:
        return RULES_VERSION
    return SURROGATES_VERSION if "surrogate_bias" in names else FORMAT_VERSION


def _of_layer(job: CalibrationJob, own: State) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The leading similarity of one layer, and its tables."""
    spec = job.spec
    moments = Moments(own["gram"].shape[0], measures=spec.measures, weighting=spec.weighting)
    moments.sums = {name: own[name] for name in moments.sums}
    by_measure = {
        measure: similarity(moments, measure)
        if measure in MOMENT_MEASURES
        else own[f"cka.{measure}"]
        for measure in spec.measures
    }
    table = {
        f"similarity_{measure.replace('-', '_')}": by_measure[measure]
        for measure in spec.measures[1:]
    }
    if "residual" in spec.measures:
        table["scale"] = substitution_scale(moments)
    table["popularity"] = moments.coactivation.diagonal().clone()
    table["popularity_by_rank"] = own["rank_counts"]
    tokens = own["rank_counts"].sum(dim=1).clamp(min=1)
    table["weight_by_rank"] = (own["rank_energy"].double() / 2**32 / tokens).sqrt().float()
    table["coactivation"] = moments.coactivation
    table |= {n.removeprefix(FITTED): t for n, t in own.items() if n.startswith(FITTED)}
    if (stream := stream_energy(own)) is not None:
        table["stream_energy"] = stream
    return by_measure[spec.measures[0]], table


def _parameters(job: CalibrationJob, text: CalibrationText, model: MoeModelInfo) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "measures": list(job.spec.measures),
        "weighting": job.spec.weighting,
        "length": job.length,
        "seed": job.seed,
        "text_digest": text.digest,
    }
    if job.spec.cka_measures:
        parameters["cka_tokens"] = min(job.spec.cka_tokens, text.num_tokens)
    if job.spec.surrogates is not None:
        parameters["surrogate_rank"] = job.spec.surrogates.rank or "auto"
    if job.layer_by_layer:
        parameters["layer_by_layer"] = True
    if job.server_args:
        parameters["server_args"] = list(job.server_args)
    if model.layers_are_loaded:
        parameters[LOADED_LAYERS] = True
    return parameters


def _today() -> str:
    """The day only, or that of SOURCE_DATE_EPOCH: the same calibration gives the same bytes."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = float(epoch) if epoch else time.time()
    return datetime.datetime.fromtimestamp(now, datetime.timezone.utc).date().isoformat()
