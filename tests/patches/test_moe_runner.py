"""A runner that takes standard top-k, chosen or advised before a weight loads: by SGLang's own
resolution of its flags, with the platform of other GPUs in place of this machine's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.server_args import ServerArgs

from sere_sglang import config
from sere_sglang.errors import SereError
from sere_sglang.options import SereConfig
from sere_sglang.patches import calibration, moe_runner
from tools import runner_page
from tools.runner_models import MODELS, QUANTIZATIONS

SERE = SereConfig(moe_backend="sere")


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    moe_runner.register()


def _resolved(
    folder: Path,
    model: str,
    weights: str,
    asked: SereConfig = SERE,
    *,
    calibrates: bool = False,
    **flags: Any,
) -> Any:
    stated = QUANTIZATIONS[weights]
    given = {**MODELS[model][0], **({"quantization_config": stated} if stated else {})}
    (folder / "config.json").write_text(json.dumps(given))
    record = ServerArgs(
        model_path=str(folder),
        mem_fraction_static=0.8,
        skip_tokenizer_init=True,
        **{"device": "cuda", **flags},
    )
    config.attach(record, asked)
    if calibrates:
        calibration.attach(record, _collector)
    record.resolve_once()
    return record


def _collector() -> Any:
    """Never made: no worker starts."""


def _refusal(record: Any, *, allow: bool = False) -> str:
    try:
        moe_runner.require_known_runner(record, allow_untested=allow)
    except SereError as error:
        return str(error)
    return ""


def test_the_page_is_current() -> None:
    assert runner_page.PAGE.read_text() == runner_page.page(), "python -m tools.runner_page"


def test_what_depends_on_the_runner_follows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with runner_page.platform(100), caplog.at_level("INFO", "sere_sglang"):
        view = resolved_view(_resolved(tmp_path, "Qwen3-MoE", "bf16"))
    assert view.moe_runner_backend == "flashinfer_trtllm_routed"
    assert view.speculative_moe_runner_backend == "flashinfer_trtllm_routed"
    assert (
        "SERE: --moe-runner-backend flashinfer_trtllm_routed, as flashinfer_trtllm, which SGLang "
        "chose, routes inside its kernel" in caplog.messages
    )


def test_without_the_flag_sglang_chooses(tmp_path: Path) -> None:
    with runner_page.platform(100):
        record = _resolved(tmp_path, "Qwen3-MoE", "bf16", SereConfig())
    assert resolved_view(record).moe_runner_backend == "flashinfer_trtllm"


@pytest.mark.parametrize(
    ("model", "weights", "sm", "asked", "advice"),
    [
        ("Qwen3-MoE", "fp8", 100, "flashinfer_trtllm", "flashinfer_trtllm_routed"),
        ("gpt-oss", "mxfp4", 90, "triton_kernel", "marlin"),
        ("gpt-oss", "mxfp4", 100, "flashinfer_mxfp4", "marlin"),
        ("gpt-oss", "bf16", 100, "triton_kernel", "triton"),
    ],
)
def test_what_a_user_chose_is_refused_with_advice_for_that_model(
    tmp_path: Path, model: str, weights: str, sm: int, asked: str, advice: str
) -> None:
    with runner_page.platform(sm):
        record = _resolved(tmp_path, model, weights, moe_runner_backend=asked)
        assert resolved_view(record).moe_runner_backend == asked
        wrong = _refusal(record, allow=True)
    assert f"--moe-runner-backend {asked} routes inside its kernel" in wrong
    assert wrong.endswith(f"; use --moe-runner-backend {advice}")


def test_what_is_not_known_is_refused_unless_allowed(tmp_path: Path) -> None:
    with runner_page.platform(100):
        record = _resolved(tmp_path, "Qwen3-MoE", "nvfp4", moe_runner_backend="flashinfer_cutedsl")
        assert "flashinfer_cutedsl" in (wrong := _refusal(record))
        assert "use --moe-runner-backend flashinfer_trtllm_routed, or try it with" in wrong
        assert not _refusal(record, allow=True)


def test_the_cpu_engine_has_no_runner(tmp_path: Path) -> None:
    record = _resolved(tmp_path, "Qwen3-MoE", "bf16", device="cpu")
    assert resolved_view(record).moe_runner_backend == "auto"
    assert not _refusal(record)


@pytest.mark.parametrize(
    ("model", "weights", "sm", "runner"),
    [
        ("Qwen3-MoE", "bf16", 90, "auto"),  # triton
        ("Qwen3-MoE", "bf16", 100, "triton"),
        ("DeepSeek-V3", "fp8", 100, "triton"),
        ("Qwen3-MoE", "nvfp4", 100, "marlin"),
        ("Qwen3-MoE", "nvfp4", 120, "marlin"),
        ("gpt-oss", "mxfp4", 90, "marlin"),
    ],
)
def test_a_calibration_gets_a_runner_that_takes_any_ids(
    tmp_path: Path, model: str, weights: str, sm: int, runner: str
) -> None:
    with runner_page.platform(sm):
        record = _resolved(tmp_path, model, weights, SereConfig(), calibrates=True)
    assert resolved_view(record).moe_runner_backend == runner
