"""With the package installed and the flag absent, SGLang is what it is without the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness import Server, run_to_exit, serve

PROMPTS = ["hello world", "the quick brown fox", "a", "jumps over the lazy dog, twice"]


def test_bit_for_bit(plain: Server, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    # Without the package the CPU engine cannot start on a machine without libcuda, so the
    # other side keeps the stand-in for sgl_kernel and leaves out everything else of ours.
    env = {"SGLANG_PLUGINS": "sere-cpu-engine"}
    unknown = run_to_exit("--model-path=any", "--moe-backend=sere", env=env)
    assert "unrecognized arguments: --moe-backend=sere" in unknown.stderr
    with serve(checkpoint("qwen3_moe"), tmp_path / "without.log", env=env) as without:
        for prompts in (PROMPTS, PROMPTS[:1]):
            ours, theirs = (
                [
                    (a["output_ids"], a["meta_info"]["output_token_logprobs"])
                    for a in server.generate(prompts, 24)
                ]
                for server in (plain, without)
            )
            assert ours == theirs
    info = plain.get("/server_info")
    assert "sere" not in info["internal_states"][0]
