"""Texts that benchmarks of quality are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pruning.text import load_texts
from server.model.demo_corpus import Part, documents

_CHARACTERS_PER_TOKEN = 16


def given_texts(source: str, part: Part, num_tokens: int) -> Sequence[str]:
    """Return the beginning of the texts in ``source``, or without one a part of the documentation.

    Raises :class:`pruning.text.TextError` for a source that has no text.
    """
    if not source:
        return list(documents([part]))
    return load_texts(source, max_characters=num_tokens * _CHARACTERS_PER_TOKEN)


def held_out_texts(sources: str, num_tokens: int) -> dict[str, Sequence[str]]:
    """Return the texts in each of ``sources``, which commas separate, by the name of the file."""
    return {
        Path(each).stem or "documentation": given_texts(each, Part.HELD_OUT, num_tokens)
        for each in sources.split(",")
    }
