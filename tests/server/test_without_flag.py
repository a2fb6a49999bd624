"""With the package installed and the flag absent, SGLang is what it is without the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.server.checks import PROMPTS, assert_same, exact_then_rerouted, top
from tests.server.harness import Server, free_port, refusal_of, serve


def test_bit_for_bit(plain: Server, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    # Without the package the CPU engine cannot start on a machine without libcuda, so the
    # other side keeps the stand-in for sgl_kernel and leaves out everything else of ours.
    env = {"SGLANG_PLUGINS": "sere-cpu-engine"}
    unknown = refusal_of("--model-path=any", "--moe-backend=sere", env=env)
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


def test_exact_routing_is_plain_sglang(sere: Server, plain: Server) -> None:
    assert_same(plain, exact_then_rerouted(sere, "qwen3_moe"))


def test_top_names_a_server_that_is_not_there(plain: Server) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    gone = top(nobody, "--looks=1")
    assert gone.returncode == 2 and f"no SGLang server answers at {nobody}" in gone.stderr
    without = top(plain.url, "--looks=1")
    assert without.returncode == 2 and "runs without --moe-backend sere" in without.stderr
