"""Patterns tried out in a process of their own, with real xgrammar."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from server.engine.base import Structure, StructureKind
from server.engine.pattern_check import PatternCheck
from server.errors import InvalidArgument
from server.model.source import DEMO_MODEL

VOCAB_SIZE = 4096


@pytest.fixture(scope="module")
async def patterns() -> AsyncIterator[PatternCheck]:
    patterns = PatternCheck(str(DEMO_MODEL), VOCAB_SIZE, seconds=5.0)
    yield patterns
    await patterns.close()


def structure(kind: str, pattern: str) -> Structure:
    return Structure(StructureKind(kind), pattern)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("json", '{"type": "object", "properties": {"a": {"type": "integer"}}}'),
        ("json", "{}"),
        ("regex", "[0-9]{3}-[a-c]+"),
        ("grammar", 'root ::= "yes" | "no"'),
    ],
)
async def test_patterns_that_can_be_compiled(
    patterns: PatternCheck, kind: str, pattern: str
) -> None:
    await patterns.check(structure(kind, pattern))
    await patterns.check(structure(kind, pattern))


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("json", "{"),
        ("regex", "(a"),
        ("grammar", "root ::= missing"),
        ("structural_tag", "[]"),
    ],
)
async def test_patterns_that_are_wrong(patterns: PatternCheck, kind: str, pattern: str) -> None:
    with pytest.raises(InvalidArgument, match=r"structure: got .* what can be compiled"):
        await patterns.check(structure(kind, pattern))


async def test_a_pattern_that_takes_too_long_harms_nobody(patterns: PatternCheck) -> None:
    slow = "root ::= " + "[a-z]* " * 5000  # takes half a minute
    with pytest.raises(InvalidArgument, match=r"it takes more than 5 s"):
        await patterns.check(structure("grammar", slow))
    await patterns.check(structure("regex", "[a-z]{3}"))


async def test_the_process_is_ended(patterns: PatternCheck) -> None:
    await patterns.check(structure("regex", "abcd"))
    process = patterns._process
    assert process is not None
    await patterns.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
