"""Flags, ``--config`` files and our own commands: parsed and within bounds, or one refusal."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

from sere_sglang import config
from sere_sglang.cli.main import app
from sere_sglang.config_check import checked, resolved
from sere_sglang.errors import USER_ERROR
from sere_sglang.option import flag_of
from sere_sglang.options import SereConfig
from tests.fuzz.outcome import cases, check_message, outcome

SEEDS = st.integers(0, 1 << 32)
TOP_K = 4
WORDS = (
    "0", "1", "2", "3", "4", "-1", "0.5", "1e400", "-1e400", "nan", "inf", "-inf", "1e-400", "1_0",
    "٣", "9" * 40, "2147483648", "", " ", "sere", "default", "static", "adaptive", "slo", "auto",
    "similarity", "energy", "budget", "exact", "fast", "balanced", "exact,fast", ",", "exact,,x",
    "on", "off", "exit", "fallback", "x" * 300, "\udcff", "\0", "a\nb", "--", "-", "[1]", "{}",
)  # fmt: skip
FLAGS = [flag_of(f.name) for f in dataclasses.fields(SereConfig)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sglang serve", allow_abbrev=False)
    parser.add_argument("--config")
    config.add_cli_args(parser)
    return parser


def _served(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> SereConfig | None:
    """What a server would start with; None where argparse itself refuses, in its own words."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            given = parser.parse_args(list(arguments))
        except SystemExit as end:
            assert end.code == USER_ERROR
            return None
    asked = checked(config.from_namespace(given))
    if not asked.enabled:
        return asked
    return resolved(asked, top_k=TOP_K)


def _is_ready(ready: SereConfig | None) -> None:
    """What would start is what `/set_internal_state` would allow."""
    if ready is None or not ready.enabled:
        return
    config.live_settings(ready).check(top_k=TOP_K)
    config.quality_rules(ready)
    for field in dataclasses.fields(ready):
        value = getattr(ready, field.name)
        assert not isinstance(value, float) or math.isfinite(value), field.name


def _flags(draw: random.Random) -> list[str]:
    picked = draw.sample(FLAGS, draw.choice((0, 1, 1, 2, 3, 5)))
    given = [] if draw.random() < 0.1 else ["--moe-backend=sere"]
    for flag in picked:
        given.append(flag if flag == "--sere-scale" else f"{flag}={draw.choice(WORDS)}")
    return given


@given(seed=SEEDS)
@cases(600)
def test_flags_of_the_server(seed: int) -> None:
    _is_ready(outcome(lambda: _served(PARSER, _flags(random.Random(seed))))[0])


@given(seed=SEEDS)
@cases(600)
def test_keywords_of_an_engine(seed: int) -> None:
    draw = random.Random(seed)
    names = [f.name for f in dataclasses.fields(SereConfig)]
    asked = {name: draw.choice(VALUES) for name in draw.sample(names, draw.choice((1, 1, 2, 3)))}
    asked.setdefault("moe_backend", "sere")

    def served() -> SereConfig:
        ready = checked(config.pop_keywords(dict(asked)))
        return resolved(ready, top_k=TOP_K) if ready.enabled else ready

    _is_ready(outcome(served)[0])


PARSER = _parser()
VALUES: tuple[Any, ...] = (
    *WORDS[:40], 0, 1, 2, -1, 1 << 64, 0.5, math.nan, math.inf, True, False, None, [1],
)  # fmt: skip


@given(seed=SEEDS)
@cases(150)
def test_config_files(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    draw = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    keys = [flag.removeprefix("--") for flag in draw.sample(FLAGS, draw.choice((1, 2, 3)))]
    keys += [draw.choice(("moe_backend", "sere_primary_k", "Sere-policy"))] * (draw.random() < 0.3)
    content = {"moe-backend": "sere"} | {key: draw.choice(VALUES) for key in keys}
    text = yaml.safe_dump(content)
    if draw.random() < 0.2:
        at = draw.randrange(len(text))
        text = (
            text[:at]
            + draw.choice(("\t", "{", "&a", "*a", ": ", "- ", "!!python/x ", "\n"))
            + text[at:]
        )
    path.write_text(text, errors="surrogateescape")

    def served() -> SereConfig | None:
        try:
            merged = ConfigArgumentMerger(PARSER).merge_config_with_args(["--config", str(path)])
        except (ValueError, TypeError, AttributeError, yaml.YAMLError):  # SGLang's own refusal
            return None
        return _served(PARSER, merged)

    _is_ready(outcome(served)[0])


COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("--measure", "--plot", "--compare", "--json"),
    "simulate": ("--profile", "--cost", "--trace", "--rate", "--peak", "--period", "--tokens",
                 "--steps", "--fixed-ms", "--row-us", "--quality-budget", "--min-gain",
                 "--tpot-slo-ms", "--primary-k", "--rule", "--seed", "--max-running"),
    "calibrate": ("--out", "--text", "--tokens", "--measure", "--device", "--layer-by-layer"),
    "doctor": ("--cuda-arch", "--out", "--device"),
    "top": ("--every", "--looks", "--api-key"),
    "nonsense": ("--x",),
}  # fmt: skip
PLACES = (
    "/nonexistent/x",
    "/dev/null",
    "/dev/zero",
    "/",
    "x" * 5000,
    "a\nb",
    "\0",
    "",
    "http://[",
    "file:///",
)


@given(seed=SEEDS)
@cases(40)
def test_our_commands(seed: int) -> None:
    """None of these can do what it is asked for: status 2 and one line, and nothing else."""
    draw = random.Random(seed)
    name = draw.choice(tuple(COMMANDS))
    required = {"simulate": ["--profile=/nonexistent", "--cost=/nonexistent"],
                "calibrate": ["--model=/nonexistent/model"],
                "doctor": ["--out=x"]}.get(name, [draw.choice(PLACES)])  # fmt: skip
    options = draw.sample(COMMANDS[name], draw.randrange(1 + min(3, len(COMMANDS[name]))))
    given = [f"{option}={draw.choice((*WORDS, *PLACES))}" for option in options]
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        app([name, *required, *given])
    # calibrate says what it will do before the model turns out not to be there.
    said = err.getvalue()[err.getvalue().find("sere-sglang: error: ") :]
    assert end.value.code == USER_ERROR, (name, given, said)
    assert said.startswith("sere-sglang: error: "), (name, given, said)
    check_message(said.removeprefix("sere-sglang: error: "))
