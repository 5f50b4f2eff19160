"""Multiple-choice questions, against the log-likelihoods of a toy engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.engine.base import LayerSelection
from server.errors import InvalidArgument
from server.evaluation.multiple_choice import Accuracy, Question, accuracy, load_questions
from tests.server.rpc.toy_engine import ToyEngine, logprob

LINE = {"query": "Question: Which? ", "choices": ["one", "another"], "gold": 1}


def test_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n" * 3)
    expected = Question("Question: Which?", ("one", "another"), 1)
    assert load_questions(path, 2) == [expected] * 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "an object with query, choices and gold; line 1 is none"),
        ("[]", "line 1 is none .*TypeError"),
        (json.dumps(LINE | {"gold": 2}), "line 1 is none .*gold is none of the"),
        (json.dumps(LINE | {"choices": ["", "b"]}), "a choice is empty"),
        ("", "holds no questions"),
    ],
)
def test_what_are_no_questions_is_refused(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(line)
    with pytest.raises(InvalidArgument, match=problem):
        load_questions(path, 5)
    with pytest.raises(InvalidArgument, match="No such file"):
        load_questions(tmp_path / "absent", 5)


def test_the_standard_error() -> None:
    assert Accuracy.of([True, False, False, False]) == Accuracy(0.25, 0.21650635094610965, 4)


async def test_the_likeliest_choice_per_character_is_the_answer() -> None:
    engine = ToyEngine()
    await engine.start()
    layers = LayerSelection((1,), (1, 2))
    questions = [Question(f"Question {n}", ("one", "another", "x"), n % 3) for n in range(40)]

    def likelihood(question: Question, choice: str) -> float:
        ids = engine.tokenize(f"{question.text}\nAnswer:")
        total = 0.0
        for token in engine.tokenize(f" {choice}", special_tokens=False):
            total += logprob(ids, token, layers)
            ids.append(token)
        return total / len(choice)

    expected = sum(
        max(question.choices, key=lambda choice: likelihood(question, choice))
        == question.choices[question.right]
        for question in questions
    )
    done: list[tuple[int, int]] = []
    found = await accuracy(engine, questions, layers, lambda *counts: done.append(counts))
    assert 0 < expected < 40
    assert found.share == expected / 40
    assert done[-1] == (40, 40)
