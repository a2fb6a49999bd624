"""The table of runners and dispatchers, against SGLang's names and its own functions."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES
from sglang.srt.layers.moe import topk, utils
from sglang.srt.layers.moe.utils import MoeA2ABackend, MoeRunnerBackend

from sere_sglang.errors import SereError
from sere_sglang.options import SereConfig
from sere_sglang.profile import ProfileMetadata, SereProfile
from sere_sglang.runtime.bind import bind_model
from sere_sglang.runtime.moe_layers import require_probabilities, require_weights_on_output
from sere_sglang.runtime.runners import (
    DISPATCHERS,
    RUNNERS,
    needs_distinct,
    require_any_ids,
    require_known,
    runner_of,
)

_NAMES = {backend.value for backend in MoeRunnerBackend} - {"auto"}


def test_weights_on_the_experts_input_are_refused() -> None:
    config = SimpleNamespace(apply_router_weight_on_input=True)
    layer = SimpleNamespace(moe_runner_config=config)
    with pytest.raises(SereError, match="LlamaMoE applies routing weights to the input"):
        require_weights_on_output(layer, "LlamaMoE")
    config.apply_router_weight_on_input = False
    require_weights_on_output(layer, "LlamaMoE")


def test_weights_that_are_logits_are_refused() -> None:
    """What SGLang's router hands to this runner, which the runner does not make weights of."""
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    weights, _ = topk.fused_topk_softmax_torch_raw_logits(logits, logits, 2, renormalize=False)
    assert sorted(weights[0].tolist()) == [0.5, 2.0], "SGLang applies the softmax now: serve them"
    own = {"scoring_func": "softmax", "use_grouped_topk": False, "renormalize": False}
    config = SimpleNamespace(**own, custom_routing_function=None, correction_bias=None)
    router = SimpleNamespace(topk_config=config)
    with pytest.raises(SereError, match="Qwen2Moe does not renormalize its"):
        require_probabilities(router, "flashinfer_trtllm_routed", "Qwen2Moe")
    require_probabilities(router, "triton", "Qwen2Moe")
    config.renormalize = True
    require_probabilities(router, "flashinfer_trtllm_routed", "Qwen3Moe")


def test_all_of_sglangs_runners_and_dispatchers_are_judged() -> None:
    own = Path(utils.__file__).parents[1] / "quantization" / "w4afp8.py"
    assert set(RUNNERS) == _NAMES | {"W4AFp8MoEMethod"}
    assert "class W4AFp8MoEMethod(" in own.read_text()
    assert set(MOE_RUNNER_BACKEND_CHOICES) - {"auto", "sere", "megamoe"} <= _NAMES
    assert set(DISPATCHERS) == {backend.value for backend in MoeA2ABackend}


@pytest.mark.parametrize("backend", MoeA2ABackend)
def test_whose_rows_a_rank_sees_is_what_sglang_says(
    monkeypatch: pytest.MonkeyPatch, backend: MoeA2ABackend
) -> None:
    monkeypatch.setattr(utils, "get_moe_a2a_backend", lambda: backend)
    monkeypatch.setattr(utils, "should_use_flashinfer_cutlass_moe_fp4_allgather", lambda: False)
    monkeypatch.setattr(utils, "get_parallel", lambda: SimpleNamespace(dwdp_size=1))
    per_rank = utils.is_moe_input_scattered_across_dp_ranks()
    assert DISPATCHERS[backend.value].rows == ("per rank" if per_rank else "global")


def test_rows_are_distinct_but_where_both_are_known_to_take_others() -> None:
    pairs = itertools.product([*RUNNERS, "an extension"], [*DISPATCHERS, "an extension"])
    others = {pair for pair in pairs if not needs_distinct(*pair)}
    assert others == {(name, "none") for name in ("triton", "marlin", "cutlass", "W4AFp8MoEMethod")}


def test_what_is_not_known_is_refused_by_name() -> None:
    def require(runner: str, dispatcher: str, *, allow: bool = False) -> None:
        require_known(runner, dispatcher, allow_untested=allow, instead="marlin")

    require("triton", "none")
    require("deep_gemm", "deepep")
    with pytest.raises(SereError, match=r"--moe-runner-backend hpc_ops .* use .* marlin, or"):
        require("hpc_ops", "none")
    with pytest.raises(SereError, match=r"--moe-a2a-backend pplx .* not known.*backend none"):
        require("deep_gemm", "pplx")
    with pytest.raises(SereError, match="--moe-runner-backend of_tomorrow"):
        require("of_tomorrow", "none")
    with pytest.raises(SereError, match=r"SGLang's GGUFMoEMethod .* serve without"):
        require("GGUFMoEMethod", "none")
    require("of_tomorrow", "pplx", allow=True)


def test_a_layers_runner_is_its_methods() -> None:
    class Method:
        backend: Any = MoeRunnerBackend.MARLIN

        def get_moe_runner_backend(self, _layer: Any) -> Any:
            return self.backend

    layer = SimpleNamespace(quant_method=Method())
    assert runner_of(layer) == "marlin"
    layer.quant_method.backend = None  # calls a kernel itself
    assert runner_of(layer) == "Method"


def test_calibration_asks_only_runners_that_take_any_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(name: str, device: str = "meta") -> Any:
        backend = MoeRunnerBackend(name)
        method = SimpleNamespace(get_moe_runner_backend=lambda _layer: backend)
        weights = torch.empty(1, device=device)
        return SimpleNamespace(quant_method=method, parameters=lambda: iter([weights]))

    for name in ("triton", "marlin", "cutlass"):
        require_any_ids(layer(name))
    for name in ("deep_gemm", "flashinfer_trtllm_routed", "hpc_ops"):
        with pytest.raises(SereError, match=f"--moe-runner-backend {name} with .*backend none"):
            require_any_ids(layer(name))
        require_any_ids(layer(name, device="cpu"))  # the CPU engine has a runner of its own
    monkeypatch.setattr(utils, "get_moe_a2a_backend", lambda: MoeA2ABackend.DEEPEP)
    with pytest.raises(SereError, match="--moe-a2a-backend deepep"):
        require_any_ids(layer("triton"))


def test_a_pipeline_stage_without_experts_is_refused_with_the_flag() -> None:
    profile = SereProfile(ProfileMetadata(), {0: torch.eye(4)})
    with pytest.raises(SereError, match=r"Identity has no MoE layers here; .* another --pp-size"):
        bind_model(torch.nn.Identity(), profile, SereConfig(), device="cpu")
