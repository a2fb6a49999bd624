"""What a bound layer must be like, and which rows its runner takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher
from sglang.srt.layers.moe.utils import MoeRunnerBackend

from sere_sglang.errors import SereError
from sere_sglang.runtime.moe_layers import require_weights_on_output
from sere_sglang.runtime.runners import TAKE_REPEATED_IDS, takes_repeated_ids


def test_weights_on_the_experts_input_are_refused() -> None:
    config = SimpleNamespace(apply_router_weight_on_input=True)
    layer = SimpleNamespace(moe_runner_config=config)
    with pytest.raises(SereError, match="LlamaMoE applies routing weights to the input"):
        require_weights_on_output(layer, "LlamaMoE")
    config.apply_router_weight_on_input = False
    require_weights_on_output(layer, "LlamaMoE")


@pytest.mark.parametrize("name", [backend.value for backend in MoeRunnerBackend])
def test_runners_that_are_not_known_to_take_repeated_ids_get_distinct_rows(name: str) -> None:
    runner = SimpleNamespace(runner_backend=MoeRunnerBackend(name))
    method = SimpleNamespace(runner=runner)
    alone = object.__new__(StandardDispatcher)
    assert takes_repeated_ids(SimpleNamespace(quant_method=method, dispatcher=alone)) == (
        name in {"triton", "marlin", "cutlass"}
    )
    between_ranks = SimpleNamespace(quant_method=method, dispatcher=SimpleNamespace())
    assert not takes_repeated_ids(between_ranks)
    unknown = SimpleNamespace(quant_method=SimpleNamespace(), dispatcher=alone)
    assert not takes_repeated_ids(unknown)


def test_only_names_that_sglang_has_are_listed() -> None:
    assert set(TAKE_REPEATED_IDS) <= {backend.value for backend in MoeRunnerBackend}
