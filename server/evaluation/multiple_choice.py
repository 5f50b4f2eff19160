"""Multiple-choice questions, answered by the log-likelihood of their choices."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from server.engine.base import Engine, LayerSelection
from server.errors import InvalidArgument
from server.task_group import run_together

# Leaves the engine enough to batch.
_CONCURRENT = 64
_ALLOWED = "lines of JSON, each an object with query, choices and gold"


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its choices, and the number of the right one."""

    text: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The share of questions that were answered rightly, with its standard error."""

    share: float
    stderr: float
    num_questions: int

    @classmethod
    def of(cls, answers: Sequence[bool]) -> Accuracy:
        share = sum(answers) / len(answers)
        return cls(share, math.sqrt(share * (1 - share) / len(answers)), len(answers))


def load_questions(path: Path, num_questions: int) -> list[Question]:
    """Read questions from JSON lines with ``query``, ``choices`` and ``gold``, the right number.

    Raises :class:`InvalidArgument`, naming file and line, for others.
    """
    questions = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument("questions", path, f"{_ALLOWED} ({error})") from None
    for number, line in enumerate(lines[:num_questions], start=1):
        try:
            entry = json.loads(line)
            choices = tuple(map(str, entry["choices"]))
            question = Question(str(entry["query"]).strip(), choices, int(entry["gold"]))
            if not 0 <= question.right < len(choices) or not all(choices):
                raise ValueError("gold is none of the choices, or a choice is empty")
        except (ValueError, LookupError, TypeError) as error:
            raise InvalidArgument(
                "questions", path, f"{_ALLOWED}; line {number} is none ({error!r})"
            ) from None
        questions.append(question)
    if not questions:
        raise InvalidArgument("questions", path, f"{_ALLOWED}; it holds no questions")
    return questions


async def accuracy(
    engine: Engine,
    questions: Sequence[Question],
    layers: LayerSelection,
    on_progress: Callable[[int, int], None],
) -> Accuracy:
    """Answer ``questions`` by the choice with the highest log-likelihood per character.

    The question is the context, and runs as a prompt does; choices run as generated tokens do.
    """
    slots = asyncio.Semaphore(_CONCURRENT)
    done = 0

    async def likelihood(name: str, question: Question, choice: str) -> float:
        context = engine.tokenize(f"{question.text}\nAnswer:")
        scored = engine.tokenize(f" {choice}", special_tokens=False)
        async with slots:
            scores = await engine.score(name, context + scored, len(context), layers)
        return math.fsum(score.logprob for score in scores) / len(choice)

    async def is_right(number: int, question: Question) -> bool:
        nonlocal done
        values = await run_together(
            likelihood(f"question-{number}-{i}", question, choice)
            for i, choice in enumerate(question.choices)
        )
        done += 1
        on_progress(done, len(questions))
        return values.index(max(values)) == question.right

    answers = await run_together(is_right(*each) for each in enumerate(questions))
    return Accuracy.of(answers)
