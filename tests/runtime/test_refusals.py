"""What a bound layer must be like; a layer that is not is named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sere_sglang.errors import SereError
from sere_sglang.runtime.moe_layers import require_weights_on_output


def test_weights_on_the_experts_input_are_refused() -> None:
    config = SimpleNamespace(apply_router_weight_on_input=True)
    layer = SimpleNamespace(moe_runner_config=config)
    with pytest.raises(SereError, match="LlamaMoE applies routing weights to the input"):
        require_weights_on_output(layer, "LlamaMoE")
    config.apply_router_weight_on_input = False
    require_weights_on_output(layer, "LlamaMoE")
