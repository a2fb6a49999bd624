"""Calibration layer by layer, for a checkpoint larger than the machine.

The whole text goes through one layer before the next one is read; in memory are one layer's
weights, the outputs of its experts for a block of tokens, and nothing of the other layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sere_sglang.calibration.collection import load_partial, save_partial, unusable_partial
from sere_sglang.calibration.decoder import Block, Decoder
from sere_sglang.calibration.hidden import HiddenStates
from sere_sglang.calibration.job import (
    SAVE_EVERY_S,
    CalibrationJob,
    Interrupted,
    Progress,
    about,
    prepare_device,
    read_text,
    resumable,
    seconds_between_saves,
)
from sere_sglang.calibration.result import State
from sere_sglang.calibration.statistics import LayerCollector, explained, is_out_of_memory
from sere_sglang.calibration.text import CalibrationText
from sere_sglang.errors import SereError
from sere_sglang.profile import MoeModelInfo


def collect(
    job: CalibrationJob, progress: Progress, stop: Callable[[], bool]
) -> tuple[CalibrationText, State, MoeModelInfo]:
    """Run the text through one layer after the other; as `through_sglang.collect`."""
    model = MoeModelInfo.from_folder(job.model)
    decoder = Decoder(job.model, prepare_device(job.device))
    progress(0, 0, "reading the text")
    text = read_text(job, _tokenizer(job.model))
    kept = resumable(job, text)
    shape = (text.num_tokens, decoder.hidden_size)
    hidden = HiddenStates(job.hidden_files, shape, decoder.dtype, keep=kept is not None)
    run = _Run(job, text, model, decoder, hidden, progress, stop)
    try:
        run.all_layers(kept)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise SereError(explained(error, job.spec, "--length")) from error
    return text, run.state, model


class _Run:
    """One pass over the layers; `state` is what is collected of finished ones."""

    def __init__(
        self,
        job: CalibrationJob,
        text: CalibrationText,
        model: MoeModelInfo,
        decoder: Decoder,
        hidden: HiddenStates,
        progress: Progress,
        stop: Callable[[], bool],
    ) -> None:
        self.job = job
        self.text = text
        self.model = model
        self.decoder = decoder
        self.hidden = hidden
        self.progress = progress
        self.stop = stop
        self.state: State = {}
        self.next_save = time.monotonic() + SAVE_EVERY_S
        # No layer behind the last one with experts matters.
        self.num_layers = model.layer_ids[-1] + 1

    def all_layers(self, kept: dict[str, Any] | None) -> None:
        first, done = (kept["layer"], kept["windows_done"]) if kept else (0, 0)
        if first > self.num_layers:
            raise unusable_partial(self.job.partial, f"the model has no layer {first}")
        mebibytes = self.decoder.layer_bytes / (1 << 20)
        self.progress(0, 0, f"one layer of {mebibytes:.0f} MiB at a time, twice that to read it")
        if kept:
            self.state, _ = load_partial(self.job.partial)
        else:
            self._embed()
        for layer in range(first, self.num_layers):
            with self.decoder.layer(layer) as block:
                self._one_layer(layer, block, done)
            done = 0

    def _embed(self) -> None:
        start = 0
        with self.decoder.embedding() as embed:
            for window in self.text.windows:
                self.hidden.into(0)[start : start + len(window)] = embed(window)
                start += len(window)

    def _one_layer(self, layer: int, block: Block, done: int) -> None:
        collector = self._collector(layer, block)
        start = sum(map(len, self.text.windows[:done]))
        for window in self.text.windows[done:]:
            part = slice(start, start + len(window))
            self._show(layer, start)
            self.hidden.into(layer + 1)[part] = block(self.hidden.into(layer)[part])
            if collector is not None and block.seen is not None:
                collector.add(*block.seen, block.scores)
                collector.add_stream(self.hidden.into(layer + 1)[part])
            done, start = done + 1, part.stop
            if self.stop():
                self._save(layer, done, collector)
                raise Interrupted
            if time.monotonic() > self.next_save:
                self._save(layer, done, collector)
        if collector is not None:
            collector.finish()
            self.state |= _named(layer, collector)
        # Before the next layer writes over what went into this one.
        self._save(layer + 1, 0, None)
        if self.stop():
            raise Interrupted

    def _collector(self, layer: int, block: Block) -> LayerCollector | None:
        has = block.experts is not None
        if has != (layer in self.model.layer_ids):
            found = "has" if has else "has no"
            raise self.decoder.refused(f"layer {layer} {found} experts against its config")
        if block.experts is None:
            return None
        layers = len(self.model.layer_ids)
        collector = LayerCollector(block.experts, self.job.spec, layers=layers)
        collector.check()
        prefix = f"{layer}/"
        names = [name for name in self.state if name.startswith(prefix)]
        if names:
            collector.restore({n.removeprefix(prefix): self.state.pop(n) for n in names})
        return collector

    def _show(self, layer: int, tokens: int) -> None:
        total = self.text.num_tokens
        done = (layer * total + tokens) // self.num_layers
        self.progress(done, total, f"running all experts, layer {layer + 1}/{self.num_layers}")

    def _save(self, layer: int, windows_done: int, collector: LayerCollector | None) -> None:
        """What `--resume` goes on with: `windows_done` of layer `layer` are collected."""
        own = _named(layer, collector) if collector is not None else {}
        told = {**about(self.job, self.text), "layer": layer, "windows_done": windows_done}
        start = time.monotonic()
        save_partial(self.job.partial, {**self.state, **own}, told)
        now = time.monotonic()
        self.next_save = now + seconds_between_saves(SAVE_EVERY_S, now - start)


def _named(layer: int, collector: LayerCollector) -> State:
    return {f"{layer}/{name}": tensor.cpu() for name, tensor in collector.state().items()}


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise SereError(f"--model: no tokenizer in {folder} ({first})") from None
