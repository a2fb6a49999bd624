"""Run as a program: ``sglang.Engine`` with SERE's keywords; prints what it saw as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

WISHES: list[Any] = [
    [{"sere": "exact"}],
    "x",
    5,
    {"SERE": "exact"},
    {"sere ": "exact"},
    {"mine": 1},
]


def _refusal(engine: Any, custom_params: Any) -> str | None:
    """What `Engine.generate` says to a wish that SERE does not know; None if it answers."""
    sampling = {"temperature": 0, "max_new_tokens": 1, "custom_params": custom_params}
    try:
        engine.generate("hello", sampling)
    except ValueError as error:
        return str(error)
    return None


def main() -> None:
    import sglang

    keywords = json.loads(sys.argv[1])
    engine = sglang.Engine(
        device="cpu",
        attention_backend="torch_native",
        disable_radix_cache=True,
        max_total_tokens=4096,
        skip_server_warmup=True,
        log_level="error",
        **keywords,
    )
    prompts = [f"prompt {i}" for i in range(6)]
    answers = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True})
    refused = [_refusal(engine, wish) for wish in WISHES]
    info = engine.get_server_info()
    seen = {
        "tokens": [len(a["output_ids"]) for a in answers],
        "sere": info["internal_states"][0].get("sere"),
        "moe_backend": info.get("moe_backend"),
        "refused": refused,
    }
    engine.shutdown()
    print("SEEN " + json.dumps(seen))


if __name__ == "__main__":
    main()
