"""``from sere_sglang import reroute``, as a caller without SGLang would use it."""

from __future__ import annotations

import doctest
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sere_sglang
from tests.ops import oracle

ROOT = Path(__file__).resolve().parents[2]
NO_SGLANG = """
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sglang", "sgl_kernel"):
            raise ImportError(f"{name} is not installed")


sys.meta_path.insert(0, Refuse())
"""


def python(code: str) -> str:
    """What `code` prints in a process where importing SGLang raises."""
    done = subprocess.run(
        [sys.executable, "-c", NO_SGLANG + code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_sglang() -> None:
    heavy = python(
        "import sere_sglang\n"
        "assert 'reroute' in dir(sere_sglang) and sere_sglang.__version__\n"
        "print(sorted({'torch', 'sglang', 'numpy'} & set(sys.modules)))"
    )
    assert heavy == "[]"


def test_reroute_needs_no_sglang() -> None:
    ids = python(
        "import torch\n"
        "from sere_sglang import reroute\n"
        "ids = torch.tensor([[0, 3], [1, 2]])\n"
        "M = torch.tensor([[1, 0, .2, .9], [0, 1, .8, .1], [.2, .8, 1, 0], [.9, .1, 0, 1]])\n"
        "print(reroute(ids, M, primary_k=1).tolist())\n"
        "print(any(name.split('.')[0] == 'sglang' for name in sys.modules))"
    )
    assert ids == "[[0, 0], [1, 1]]\nFalse"


def test_apply_rule_needs_no_sglang() -> None:
    ids = python(
        "import torch\n"
        "from sere_sglang import apply_rule\n"
        "p = torch.tensor([[.5, .3, .2], [.1, .6, .3]])\n"
        "weights, ids = p.topk(2)\n"
        "print(apply_rule('topk', ids, weights, scores=p, k0=1).ids.tolist())\n"
        "print(any(name.split('.')[0] == 'sglang' for name in sys.modules))"
    )
    assert ids == "[[0, 1], [1, 0]]\nFalse"


def test_the_signature_is_the_contract() -> None:
    parameters = inspect.signature(sere_sglang.reroute).parameters.values()
    assert [(p.name, p.kind is p.KEYWORD_ONLY, p.default) for p in parameters] == [
        ("topk_ids", False, inspect.Parameter.empty),
        ("similarity", False, inspect.Parameter.empty),
        ("primary_k", True, inspect.Parameter.empty),
        ("threshold", True, 0.0),
        ("topk_weights", True, None),
        ("num_valid", True, None),
        ("protected", True, None),
        ("impl", True, "auto"),
    ]


def test_the_signature_of_apply_rule_is_the_contract() -> None:
    parameters = inspect.signature(sere_sglang.apply_rule).parameters.values()
    required = inspect.Parameter.empty
    assert [(p.name, p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY] == [
        ("rule", required),
        ("topk_ids", required),
        ("topk_weights", required),
    ]
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == {
        "scores": None,
        "similarity": None,
        "primary_k": None,
        "threshold": 0.0,
        "k0": None,
        "budget": None,
        "warmup": True,
        "fill": "piggyback",
        "loss": None,
        "fill_weight": 0.0,
        "renormalize": 0.0,
        "num_valid": None,
        "protected": None,
        "impl": "auto",
    }


def test_no_other_name_is_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'rerouted'"):
        _ = sere_sglang.rerouted  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_argument_at_once_against_the_oracle(impl: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    tokens, experts, top_k = 9, 12, 4
    weights = torch.rand(tokens, top_k, generator=generator)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].to(dtype)
    ids[2, 1] = -1
    similarity = torch.rand(experts, experts, generator=generator)
    protected = torch.arange(tokens) % 4 == 1
    before = ids.clone()
    moved = 0
    for primary_k in (-1, 0, 1, 2, 3, top_k, 2**40):
        for threshold in (0, 0.0, 0.8, 1.0):
            for given in (None, weights, weights.to(torch.bfloat16)):
                got = sere_sglang.reroute(
                    ids,
                    similarity,
                    primary_k=primary_k,
                    threshold=threshold,
                    topk_weights=given,
                    num_valid=7,
                    protected=protected,
                    impl=impl,
                )
                want = oracle.reroute(
                    ids.tolist(),
                    None if given is None else given.float().tolist(),
                    similarity.tolist(),
                    enabled=0 < primary_k < top_k,
                    num_valid=7,
                    classes=[(primary_k, threshold), (top_k, 0.0)],
                    row_class=protected.int().tolist(),
                )
                assert got.dtype == torch.int32 and got.is_contiguous()
                assert got.tolist() == want.ids
                moved += want.counters["rerouted"]
    assert torch.equal(ids, before) and moved > 0


def test_what_comes_back_is_new_even_if_nothing_moves() -> None:
    ids = torch.tensor([[0, 1]], dtype=torch.int32)
    got = sere_sglang.reroute(ids, torch.eye(2), primary_k=2)
    assert torch.equal(got, ids) and got.data_ptr() != ids.data_ptr()


def test_no_rows_and_ids_that_are_views() -> None:
    empty = torch.empty(0, 4, dtype=torch.int32)
    assert sere_sglang.reroute(empty, torch.eye(8), primary_k=1).shape == (0, 4)
    wide = torch.tensor([[0, 3, 9], [1, 2, 9]], dtype=torch.int32)
    similarity = torch.eye(4)
    narrow = sere_sglang.reroute(wide[:, :2], similarity, primary_k=1)
    same = sere_sglang.reroute(wide[:, :2].clone(), similarity, primary_k=1)
    assert torch.equal(narrow, same)


def test_the_examples_of_the_semantics_are_true() -> None:
    failed, run = doctest.testfile(str(ROOT / "docs/semantics.md"), module_relative=False)
    assert run == 16 and failed == 0
