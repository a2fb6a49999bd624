"""``launch/gpu_server.py``: what is kept, what is run again. tests/server runs a step of it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import gpu_server
from launch.gpu_moe_layer import TOLERANCE, Experts, farthest, reference
from launch.gpu_server_models import MODELS, TINY, layers_that_fit, write_model
from launch.gpu_server_steps import Machine
from sere_sglang.profile import MoeModelInfo, check_profile_fits, load_profile


class Steps:
    """In place of servers: what each step saw, and how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
        self.asked: list[str] = []
        self.saw: dict[str, Any] = {"exact": {"passed": True}, "runners": {"passed": False}}
        self.out = out
        self._patch = monkeypatch
        monkeypatch.setattr(gpu_server, "steps", lambda _at: {n: self._step(n) for n in self.saw})

    def _step(self, name: str) -> Any:
        def run(_at: Any, model: Path) -> dict[str, Any]:
            assert (model / "config.json").is_file()
            self.asked.append(name)
            if isinstance(self.saw[name], Exception):
                raise self.saw[name]
            return dict(self.saw[name])

        return run

    def main(self, *flags: str) -> int:
        arguments = ["gpu_server", "--dry-run", f"--out={self.out}", *flags]
        self._patch.setattr(sys, "argv", arguments)
        return gpu_server.main()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Steps:
    return Steps(monkeypatch, tmp_path)


def test_what_is_there_is_not_run_again(made: Steps, capsys: pytest.CaptureFixture[str]) -> None:
    assert made.main() == 1  # a step has failed
    assert made.asked == ["exact", "runners"]
    assert "passed  tiny  exact" in (said := capsys.readouterr().out)
    assert "FAILED  tiny  runners" in said
    assert made.main("--only", "exact") == 0
    assert made.asked == ["exact", "runners"]
    made.saw["runners"] = {"passed": True}
    assert made.main("--again", "runners") == 0
    assert made.asked == ["exact", "runners", "runners"]


def test_a_step_that_raises_or_hangs_is_kept_as_failed(made: Steps) -> None:
    made.saw = {"exact": OSError("gone"), "runners": {"passed": True}}
    assert made.main() == 1
    lines = (made.out / "gpu_server.jsonl").read_text().splitlines()
    results = [json.loads(line)["result"] for line in lines]
    assert [each["passed"] for each in results] == [False, True]
    assert results[0]["why"] == "OSError: gone"
    began = time.monotonic()
    hung = gpu_server._within(1, lambda *_: time.sleep(60), Machine(dry=True), made.out)
    assert hung["why"].startswith("TimeoutError") and time.monotonic() - began < 30


def test_no_time_and_no_such_step(made: Steps, capsys: pytest.CaptureFixture[str]) -> None:
    assert made.main("--budget", "5") == 1
    assert "the same command goes on" in capsys.readouterr().out
    assert made.main("--only", "other") == 2
    assert not made.asked


def test_a_skipped_step_says_so_and_is_tried_again(
    made: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    made.saw = {"ranks": {"passed": True, "skipped": "needs two GPUs"}}
    assert made.main() == made.main() == 0
    assert made.asked == ["ranks", "ranks"]
    assert "skipped  tiny  ranks: skipped: needs two GPUs" in capsys.readouterr().out


@pytest.mark.parametrize("top_k", [2, 4, 8])
def test_a_lost_slot_is_farther_away_than_rounding(top_k: int) -> None:
    """The weakest slot but those of weight 0, of a reference computed once more by hand."""
    made = torch.Generator().manual_seed(top_k)
    experts, hidden, width, rows = 16, 64, 32, 5
    w13 = torch.randn(experts, 2, width, hidden, generator=made).bfloat16() / 8
    w2 = torch.randn(experts, hidden, width, generator=made).bfloat16() / 6
    x = torch.randn(rows, hidden, generator=made).bfloat16()
    ids = torch.stack([torch.randperm(experts, generator=made)[:top_k] for _ in range(rows)])
    weights = torch.rand(rows, top_k, generator=made).softmax(-1)
    wanted = reference(x, ids, weights, Experts(w13, w2))
    for row in range(rows):
        by_hand = torch.zeros(hidden)
        for expert, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
            gate, up = w13[expert].float() @ x[row].float()
            by_hand += weight * (w2[expert].float() @ (gate * gate.sigmoid() * up))
        torch.testing.assert_close(wanted[row], by_hand)
    assert farthest(wanted.bfloat16(), wanted) < TOLERANCE / 5
    weights[3, int(weights[3].argmin())] = 0
    assert farthest(reference(x, ids, weights, Experts(w13, w2)), wanted) > TOLERANCE


@pytest.mark.parametrize("name", [*MODELS, "tiny"])
def test_a_model_and_its_profile_fit(name: str, tmp_path: Path) -> None:
    config = TINY if name == "tiny" else MODELS[name]
    model = MoeModelInfo.from_folder(write_model(config, tmp_path / "model", layers=3))
    path = tmp_path / "model" / "sere_profile.safetensors"
    check_profile_fits(load_profile(path), model, path)
    assert model.num_layers == min(3, config["num_hidden_layers"])
    assert layers_that_fit(config, 141e9) >= 2
