"""A decoder with one layer in memory, built from transformers' own modules.

The whole model is built without weights; a layer gets its own from the checkpoint through
transformers' weight conversion, runs, and gives them up. What a layer is called with (masks,
rotary embeddings) is what the model's own forward calls it with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from sere_sglang.calibration.checkpoint import Checkpoint
from sere_sglang.calibration.router_scores import scores_behind
from sere_sglang.errors import SereError

_FIX = "drop --layer-by-layer to calibrate it through SGLang"


class Decoder:
    """A model folder's decoder. Raises `SereError` for one that cannot be run by layers."""

    def __init__(self, folder: str, device: str) -> None:
        self.device = torch.device(device)
        self.checkpoint = Checkpoint(folder)
        self.model = _without_weights(folder)
        self.name = type(self.model).__name__
        self.dtype: torch.dtype = self.model.dtype
        self.base = self.model.get_decoder()
        layers = getattr(self.base, "layers", None)
        if not isinstance(layers, torch.nn.ModuleList) or not hasattr(self.base, "embed_tokens"):
            raise self.refused("its decoder has no plain list of layers")
        self.layers: list[Any] = list(layers)
        self._path = next(n for n, m in self.model.named_modules() if m is layers)
        self._recorder = _Recorder(self.layers)
        self._arguments = lru_cache(maxsize=8)(self._arguments_for)
        self._fill_buffers(self.base, skip=layers)

    def refused(self, why: str) -> SereError:
        return SereError(f"--layer-by-layer: {self.name} cannot be run by layers: {why}; {_FIX}")

    @property
    def hidden_size(self) -> int:
        return int(self.base.embed_tokens.embedding_dim)

    @property
    def layer_bytes(self) -> int:
        """Of the largest layer's weights."""
        return max(sum(p.numel() * p.element_size() for p in m.parameters()) for m in self.layers)

    @contextmanager
    def embedding(self) -> Iterator[Any]:
        """Within it, what gives the first layer's input [n, H] of token ids."""
        embed = self.base.embed_tokens
        self._load(next(n for n, m in self.model.named_modules() if m is embed))
        checked = False

        def run(ids: list[int]) -> torch.Tensor:
            nonlocal checked
            seen = self._record(input_ids=torch.tensor([ids], device=self.device))
            if not checked and not _same(seen[1:], self._arguments(len(ids))):
                raise self.refused("its layers take more of the text than the hidden states")
            checked = True
            return seen[0][0]

        try:
            yield run
        finally:
            embed.to_empty(device="meta")

    @contextmanager
    def layer(self, index: int) -> Iterator[Block]:
        """Within it, layer `index` with its weights."""
        module = self.layers[index]
        self._load(f"{self._path}.{index}")
        self._fill_buffers(module)
        block = Block(self, index)
        try:
            yield block
        finally:
            block.close()
            module.to_empty(device="meta")

    def arguments(self, index: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What layer `index` is called with beside the hidden states of `length` tokens."""
        return self._arguments(length)[index]

    def _arguments_for(self, length: int) -> list[Any]:
        shape = (1, length, self.hidden_size)
        return self._record(inputs_embeds=torch.zeros(shape, dtype=self.dtype, device=self.device))[
            1:
        ]

    def _record(self, **inputs: Any) -> list[Any]:
        try:
            with torch.no_grad(), self._recorder:
                self.base(**inputs, use_cache=False)
        except _AllRecorded:
            hidden, calls = self._recorder.hidden, self._recorder.calls
            if hidden is not None and len(calls) == len(self.layers):
                return [hidden, *calls]
        raise self.refused("its layers are not called one after the other")

    def _load(self, path: str) -> None:
        """Read the weights of the module at `path` from the checkpoint."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        mapping: list[Any] = list(get_model_conversion_mapping(self.model))
        how = LoadStateDictConfig(
            dtype=self.dtype, device_map={"": self.device}, weight_mapping=mapping
        )
        with self.checkpoint.tensors_below(path, self.model.base_model_prefix) as found:
            done, _ = convert_and_load_state_dict_in_model(self.model, dict(found), how)
        wrong = [*done.conversion_errors, *done.mismatched_keys, *done.error_msgs]
        wrong += [n for n, p in self.model.get_submodule(path).named_parameters() if p.is_meta]
        if wrong:
            raise self.refused(f"the checkpoint does not give {path} its weights ({wrong[0]})")

    def _fill_buffers(self, module: Any, skip: Any = None) -> None:
        """Compute what no checkpoint holds, such as the frequencies of rotary embeddings."""
        skipped = set(skip.modules()) if skip is not None else set()
        for part in module.modules():
            buffers = dict(part.named_buffers(recurse=False))
            if part in skipped or not any(b.is_meta for b in buffers.values()):
                continue
            part.to_empty(device=self.device, recurse=False)
            self.model._init_weights(part)


class Block:
    """One layer with its weights: hidden states [n, H] in, [n, H] out.

    seen: after a call, what the experts were given: rows [n, H], ids [n, K] and weights [n, K].
    scores: after a call, float32 [n, E] of the router, None where it does not say.
    """

    def __init__(self, decoder: Decoder, index: int) -> None:
        self._decoder = decoder
        self._module = decoder.layers[index]
        self._index = index
        self.seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._logits: torch.Tensor | None = None
        modules = [m for m in self._module.modules() if _holds_experts(m)]
        if len(modules) > 1:
            raise decoder.refused(f"layer {index} has {len(modules)} groups of experts")
        self.experts = BlockExperts(modules[0], index, decoder) if modules else None
        self._hooks = [modules[0].register_forward_pre_hook(self._look)] if modules else []
        if modules:
            self._hooks += [m.register_forward_hook(self._look_at_router)
                            for m in self._module.modules() if m is not modules[0]]  # fmt: skip

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._decoder.arguments(self._index, len(hidden))
        self.seen = self._logits = None
        result = self._module(hidden[None].to(self._decoder.device), *args, **kwargs)
        result = result[0] if isinstance(result, tuple) else result
        if self.experts is not None and self.seen is None:
            raise self._decoder.refused(f"layer {self._index} does not call its experts")
        return result[0]

    @property
    def scores(self) -> torch.Tensor | None:
        if self.seen is None or self._logits is None:
            return None
        return scores_behind(self._logits, *self.seen[1:])

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look_at_router(self, _module: Any, _args: Any, output: Any) -> None:
        """Routers of transformers return logits [n, E], weights and ids [n, K], in this order."""
        if not (isinstance(output, tuple) and len(output) == 3) or self.experts is None:
            return
        if all(isinstance(part, torch.Tensor) and part.dim() == 2 for part in output):
            logits, one, other = output
            if logits.shape[1] == self.experts.num_experts and one.shape == other.shape:
                self._logits = logits

    def _look(self, _module: Any, args: tuple[Any, ...]) -> None:
        if len(args) == 3 and args[0].dim() == 2 and args[1].shape == args[2].shape:
            rows, ids, weights = args
            if len(ids) == len(rows) and not ids.is_floating_point():
                self.seen = rows.clone(), ids, weights
                return
        raise self._decoder.refused("its experts do not take rows, expert ids and weights")


class BlockExperts:
    """The experts of a transformers module that holds them as [E, ..., ...] parameters."""

    def __init__(self, module: Any, layer_id: int, decoder: Decoder) -> None:
        self.module = module
        self.layer_id = layer_id
        self.device = decoder.device
        self.hidden_size = decoder.hidden_size
        self.num_experts, one, other = module.down_proj.shape
        self.width = int(one * other // self.hidden_size)
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        self.expert_bytes = size / self.num_experts

    @torch.no_grad()
    def outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """[E, n, H]: each expert by itself, with weight 1."""
        outputs = rows.new_empty(self.num_experts, *rows.shape)
        weights = rows.new_ones(len(rows), 1)
        for expert in range(self.num_experts):
            ids = torch.full((len(rows), 1), expert, dtype=torch.int64, device=rows.device)
            outputs[expert] = self.module(rows, ids, weights)
        return outputs


class _AllRecorded(Exception):
    """Raised by the last layer, so that nothing behind it runs without weights."""


class _Recorder:
    """While active, layers keep what they are called with and pass the hidden states on."""

    def __init__(self, layers: list[Any]) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.hidden: torch.Tensor | None = None
        self._count = len(layers)
        self._active = False
        for layer in layers:
            layer.forward = self._instead_of(layer.forward)

    def __enter__(self) -> None:
        self._active, self.calls, self.hidden = True, [], None

    def __exit__(self, *_: object) -> None:
        self._active = False

    def _instead_of(self, original: Any) -> Any:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return original(hidden_states, *args, **kwargs)
            if self.hidden is None:
                self.hidden = hidden_states
            elif self.hidden is not hidden_states:  # something happens between the layers
                raise _AllRecorded
            self.calls.append((args, kwargs))
            if len(self.calls) == self._count:
                raise _AllRecorded
            return hidden_states

        return forward


def _without_weights(folder: str) -> Any:
    try:
        import transformers.core_model_loading  # noqa: F401  of transformers 5
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise SereError(f"--layer-by-layer needs transformers 5 ({error}); {_FIX}") from None
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns of long texts, which are cut into windows
    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None):
            raise SereError(f"--layer-by-layer: {folder} is quantized; {_FIX}")
        dtype = getattr(config, "dtype", None) or torch.bfloat16
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, experts_implementation="eager"
            )
    except (ValueError, KeyError, ImportError) as error:
        first = str(error).splitlines()[0]
        raise SereError(
            f"--layer-by-layer: transformers cannot build {folder} ({first}); {_FIX}"
        ) from None
    return model.eval()


def _holds_experts(module: Any) -> bool:
    down = getattr(module, "down_proj", None)
    return isinstance(down, torch.nn.Parameter) and down.dim() == 3


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or a == b
